// Findings, what was run, and what could not be read.

const KINDS = {
  tail: "Tail: last layers that add little",
  bottleneck: "Bottleneck: narrower than what reaches it",
  "over-wide": "Over-wide: more features than are used",
  dead: "Dead: layers or units without variance",
  collapse: "Collapse: the spectrum breaks down while training",
  gap: "Gap: train and eval differ",
  "too-few-observations": "Too few observations to tell",
  "too-few-columns": "Too few columns in a sketch to tell",
};
const NAMED_LAYERS = 8;
const OPEN_RUNS = 3;
const LISTED_RUNS = 8;

function findingCard(run, finding) {
  const known = finding.layers.map((name) => run.layers.findIndex((layer) => layer.name === name));
  const button = (i) => {
    const name = finding.layers[i];
    if (known[i] < 0) return nameOf(shorten(name, 80));
    const click = () => {
      choose({ run: DATA.runs.indexOf(run) });
      choose({ layer: known[i], step: nearestStep(run, finding.step), phase: finding.phase || state.phase });
      byId("layers-title").scrollIntoView();
    };
    return element("button", { type: "button", class: "link", onclick: click, title: name }, nameOf(shorten(name, 80)));
  };
  const list = (indices) => indices.flatMap((i, place) => (place ? [", ", button(i)] : [button(i)]));
  const indices = finding.layers.map((_, i) => i);
  const rest = indices.slice(NAMED_LAYERS);
  const layers = element("p", { class: "layers" }, ...list(indices.slice(0, NAMED_LAYERS)));
  const more = rest.length ? folded(`and ${plural(rest.length, "more layer")}`, element("p", {}, ...list(rest))) : null;
  const rule = element(
    "div",
    {},
    element("p", { text: finding.rule }),
    element("p", { text: `Source: ${finding.source}` }),
  );
  return element(
    "article",
    { class: "finding" },
    element(
      "p",
      {},
      element("span", { class: "kind", text: KINDS[finding.kind] || finding.kind }),
      indices.length ? " — " : "",
      layers,
      element("span", { class: "muted", text: ` (${finding.phase}, step ${finding.step})` }),
    ),
    more,
    element("p", {}, nameOf(finding.evidence)),
    element("p", {}, element("b", { text: "Advice: " }), nameOf(finding.advice)),
    folded("Rule and source", rule),
  );
}

function nearestStep(run, step) {
  const steps = stepsOf(run);
  return steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best), steps.at(-1));
}

function showFindings() {
  const target = byId("findings");
  const cards = (run) => run.findings.map((finding) => findingCard(run, finding));
  if (DATA.runs.length === 1) {
    target.append(...(cards(DATA.runs[0]).length ? cards(DATA.runs[0]) : [noFindings()]));
    return;
  }
  if (!DATA.runs.some((run) => run.findings.length)) {
    target.append(noFindings());
    return;
  }
  const groups = DATA.runs.map((run, i) => {
    const count = run.findings.length;
    const summary = element("summary", {}, nameOf(run.label), `: ${count ? plural(count, "finding") : "no findings"}`);
    const group = element("details", { class: "finding-group", open: i < OPEN_RUNS && count > 0 }, summary);
    group.append(...(count ? cards(run) : [noFindings()]));
    return group;
  });
  const rest = groups.slice(LISTED_RUNS);
  target.append(...groups.slice(0, LISTED_RUNS));
  if (rest.length) target.append(folded(`${plural(rest.length, "more run")}`, element("div", {}, ...rest)));
}

function noFindings() {
  return element("p", {
    text: "No findings: no rule for dead, over-wide, collapsing or other conspicuous layers applies.",
  });
}

function showProblems() {
  if (!DATA.problems.length) return;
  const items = DATA.problems.map((sentence) => element("li", { class: "problem" }, nameOf(sentence)));
  byId("problems").append(element("h3", { text: "Not read, or left out" }), element("ul", {}, ...items));
}

function thinning(run) {
  const parts = phasesOf(run).flatMap((phase) => {
    const { steps, of, eigensteps } = run.phases[phase];
    const said = steps.length < of ? [`${phase}: ${steps.length} of ${of} steps`] : [];
    return eigensteps.length < steps.length ? [...said, `${phase} spectra: ${eigensteps.length} of ${of} steps`] : said;
  });
  const thinned = run.scalars.some((line) => numbersAt(line.steps).count < line.of);
  if (thinned) parts.push("recorded scalars: some of their points");
  const left = run.scalars_left_out;
  if (left.length) parts.push(`recorded scalars: not ${left.slice(0, 5).join(", ")}${left.length > 5 ? ", …" : ""}`);
  const widest = Math.max(0, ...run.layers.map((layer) => layer.features));
  if (widest > 0 && run.ranks[widest].length < widest) parts.push("spectra of wide layers: some of their ranks");
  return parts.length ? `${parts.join("; ")}. The Parquet files have all.` : "";
}

function showRuns() {
  if (DATA.runs.length > 1) byId("runs").append(runsTable());
  const show = (newRun) => {
    if (!newRun) return;
    const run = currentRun();
    const facts = [["run", run.name], ...run.facts];
    const kept = thinning(run);
    if (kept) facts.push(["on this page", kept]);
    const parts = [
      ["Options", run.options],
      ["Versions", run.versions],
      ["Attempts", run.attempts],
    ].filter(([, pairs]) => pairs.length);
    const details = element(
      "div",
      { class: "folded" },
      ...parts.map(([title, pairs]) => folded(`${title} (${pairs.length})`, pairsList(pairs))),
    );
    byId("run-facts").replaceChildren(pairsList(facts), details);
  };
  listeners.push(show);
  show(true);
}

function runsTable() {
  const phases = ["train", "eval"].filter((phase) => DATA.runs.some((run) => run.phases[phase]));
  const heads = ["run", "layers", "steps", ...phases.map((phase) => `mean saturation, ${phase}`), "findings"];
  const head = element(
    "tr",
    {},
    ...heads.map((text, i) => element("th", { text, scope: "col", class: i ? "" : "text" })),
  );
  const rows = DATA.runs.map((run, i) => {
    const button = element(
      "button",
      { type: "button", class: "link", onclick: () => choose({ run: i }) },
      nameOf(run.label),
    );
    const last = (phase) => (run.phases[phase] ? run.phases[phase].steps.length - 1 : -1);
    const cells = [
      String(run.layers.length),
      String(Math.max(...phasesOf(run).map((phase) => run.phases[phase].of))),
      ...phases.map((phase) => format(meanAt(run, phase, "saturation", last(phase)), "share")),
      String(run.findings.length),
    ];
    return element(
      "tr",
      {},
      element("td", { class: "text name" }, button),
      ...cells.map((text) => element("td", { text })),
    );
  });
  const show = () => rows.forEach((row, i) => row.classList.toggle("chosen", i === state.run));
  listeners.push(show);
  show();
  const table = element("table", { id: "runs-table" }, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", { class: "table-frame" }, table);
}
