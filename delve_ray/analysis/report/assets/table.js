// The table of layers: sorts by any column, filters by text, and takes further statistics as columns.

const table = { sortBy: null, descending: false, filter: "", extra: new Set() };

function tableColumns(run) {
  const columns = [
    { key: "layer", label: "layer", title: "name in the model", text: true, value: (i) => run.layers[i].name },
    { key: "type", label: "type", title: "class of the layer", text: true, value: (i) => run.layers[i].type },
    {
      key: "features",
      label: "features",
      title: "width of the layer: d",
      value: (i) => run.layers[i].features,
      form: "count",
    },
  ];
  for (const phase of phasesOf(run)) {
    const window = windowAt(run, phase, state.step);
    const at = (statistic) => (i) => valueAt(run, phase, statistic, i, window);
    const samples = at("samples");
    const ratio = (i) => (samples(i) === null || !run.layers[i].features ? null : samples(i) / run.layers[i].features);
    const own = [
      { key: "samples", label: "samples", title: "observations in this window: n", value: samples, form: "count" },
      { key: "ratio", label: "n/d", title: "samples per feature", value: ratio },
      {
        key: "intrinsic_dimensionality",
        label: "dim",
        title: STATISTICS.get("intrinsic_dimensionality").meaning,
        value: at("intrinsic_dimensionality"),
        form: "count",
      },
      {
        key: "saturation",
        label: "saturation",
        title: STATISTICS.get("saturation").meaning,
        value: at("saturation"),
        form: "share",
      },
      ...[...table.extra]
        .filter((name) => hasSome(run, name))
        .map((name) => {
          const words = STATISTICS.get(name);
          return { key: name, label: words.label, title: words.meaning, value: at(name), form: words.form };
        }),
    ];
    own.forEach((column, i) =>
      columns.push({ ...column, key: `${phase}/${column.key}`, kind: column.key, phase, window, first: i === 0 }),
    );
  }
  return columns;
}

// Values in ascending order, texts by their alphabet with numbers in them as numbers; what is missing comes last.
function compare(a, b, descending) {
  const missing = (value) => value === null || Number.isNaN(value);
  if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
  const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : Number(a > b) - Number(a < b);
  return descending ? -order : order;
}

function shownLayers(run, columns) {
  const wanted = table.filter.trim().toLowerCase();
  const matches = (layer) =>
    !wanted || layer.name.toLowerCase().includes(wanted) || layer.type.toLowerCase().includes(wanted);
  const indices = run.layers.map((_, i) => i).filter((i) => matches(run.layers[i]));
  const column = columns.find((one) => one.key === table.sortBy);
  if (!column) return indices;
  const values = new Map(indices.map((i) => [i, column.value(i)]));
  return indices.sort((a, b) => compare(values.get(a), values.get(b), table.descending) || a - b);
}

function sortBy(column) {
  const startsDown = !column.text;
  if (table.sortBy !== column.key) Object.assign(table, { sortBy: column.key, descending: startsDown });
  else if (table.descending === startsDown) table.descending = !startsDown;
  else table.sortBy = null;
  showTable();
  const again = [...byId("layers").querySelectorAll("th button")].find((button) => button.dataset.key === column.key);
  if (again) again.focus();
}

function heading(run, columns) {
  const groups = element("tr", {}, element("th", { colSpan: 3, class: "text" }));
  for (const phase of phasesOf(run)) {
    const own = columns.filter((column) => column.phase === phase);
    const window = own[0].window;
    const title = window < 0 ? `${phase}, nothing yet` : `${phase}, step ${run.phases[phase].steps[window]}`;
    groups.append(
      element("th", {
        colSpan: own.length,
        text: title,
        scope: "colgroup",
        class: "phase-start",
        style: "text-align: center",
      }),
    );
  }
  const heads = columns.map((column) => {
    const sorted = table.sortBy === column.key;
    const arrow = element("span", {
      class: "arrow",
      "aria-hidden": "true",
      text: sorted ? (table.descending ? "▼" : "▲") : "",
    });
    const button = element(
      "button",
      { type: "button", title: column.title, onclick: () => sortBy(column) },
      column.label,
      arrow,
    );
    button.dataset.key = column.key;
    const order = sorted ? (table.descending ? "descending" : "ascending") : "none";
    return element("th", { scope: "col", "aria-sort": order, class: classOf(column) }, button);
  });
  return element("thead", {}, groups, element("tr", {}, ...heads));
}

function classOf(column) {
  return [column.text ? "text" : "", column.first ? "phase-start" : ""].join(" ").trim();
}

function saturationBar(value, phase) {
  const fill = element("i");
  fill.style.width = `${100 * Math.min(1, Math.max(0, isNumber(value) ? value : 0))}%`;
  const track = element("span", { class: `track ${phase}`, "aria-hidden": "true" }, fill);
  return element(
    "div",
    { class: "saturation" },
    track,
    element("span", { class: "share", text: format(value, "share") }),
  );
}

function cell(run, column, i) {
  const value = column.value(i);
  const made = element("td", { class: classOf(column) });
  if (column.key === "layer") {
    made.classList.add("name");
    const button = element(
      "button",
      { type: "button", class: "link", title: value, onclick: () => choose({ layer: i }) },
      nameOf(value),
    );
    made.append(button);
  } else if (column.text) {
    made.classList.add("type");
    made.title = value;
    made.append(nameOf(value));
  } else if (column.kind === "saturation") {
    made.append(saturationBar(value, column.phase));
  } else {
    const scarce = column.kind === "ratio" && isNumber(value) && value < 1;
    made.textContent = column.kind === "ratio" ? ratioText(value) : format(value, column.form);
    if (scarce) {
      made.classList.add("scarce");
      made.textContent += " !";
      made.title = "fewer samples than features";
    }
  }
  return made;
}

function ratioText(value) {
  if (!isNumber(value)) return format(value);
  return value >= 100 ? WHOLE.format(Math.round(value)) : Number(value.toPrecision(3)).toString();
}

function means(run, columns, indices) {
  const cells = columns.slice(3).map((column) => {
    const made = element("td", { class: classOf(column) });
    if (column.kind === "saturation") made.append(saturationBar(meanOf(indices.map(column.value)), column.phase));
    return made;
  });
  return element(
    "tfoot",
    {},
    element("tr", {}, element("td", { colSpan: 3, class: "text", text: "mean of these layers" }), ...cells),
  );
}

function notes(run, columns, indices) {
  const said = [];
  for (const phase of phasesOf(run)) {
    const window = windowAt(run, phase, state.step);
    const scarce = indices.filter((i) => isScarce(run, phase, i, window));
    const few = `${plural(scarce.length, "layer")} with fewer samples than features`;
    if (scarce.length) said.push(`${phase}: ${few}, marked “!”.`);
    const left = indices.filter((i) => valueAt(run, phase, "nonfinite_rows", i, window) > 0);
    const which = `${plural(left.length, "layer")} with non-finite observations, which were left out`;
    if (left.length) said.push(`${phase}: ${which} (“non-finite rows” among the columns).`);
  }
  return said;
}

function showTable() {
  const run = currentRun();
  const columns = tableColumns(run);
  const indices = shownLayers(run, columns);
  const rows = indices.map((i) => {
    const row = element("tr", {}, ...columns.map((column) => cell(run, column, i)));
    row.dataset.layer = String(i);
    return row;
  });
  byId("layers").replaceChildren(heading(run, columns), element("tbody", {}, ...rows), means(run, columns, indices));
  const count = run.layers.length;
  byId("filter-count").textContent =
    indices.length === count ? plural(count, "layer") : `${indices.length} of ${plural(count, "layer")}`;
  byId("table-notes").replaceChildren(...notes(run, columns, indices).map((text) => element("li", { text })));
  markChosen();
}

function markChosen() {
  for (const row of byId("layers").tBodies[0].rows)
    row.classList.toggle("chosen", row.dataset.layer === String(state.layer));
}

function setUpTable() {
  const always = new Set(["saturation", "intrinsic_dimensionality"]);
  byId("filter").addEventListener("input", (event) => {
    table.filter = event.target.value;
    showTable();
  });
  const showChoices = () => {
    const run = currentRun();
    const names = statisticsOf(run).filter((name) => !always.has(name));
    const choices = names.map((name) => {
      const box = element("input", { type: "checkbox", value: name, checked: table.extra.has(name) });
      box.addEventListener("change", () => {
        if (box.checked) table.extra.add(name);
        else table.extra.delete(name);
        showTable();
      });
      const words = STATISTICS.get(name);
      return element("label", { title: words.meaning }, box, words.label);
    });
    byId("column-choices").replaceChildren(...choices);
    const thresholds = run.facts.find(([label]) => label === "threshold δ");
    byId("threshold").textContent = thresholds ? thresholds[1] : "the share δ of the variance";
  };
  let shown = null;
  const show = (newRun) => {
    if (newRun) showChoices();
    const wanted = `${state.run}/${state.step}`;
    if (wanted === shown) markChosen();
    else showTable();
    shown = wanted;
  };
  listeners.push(show);
  show(true);
}
