// Put the page together: texts and table at once, charts when they come into sight.

function setUpFigures() {
  const target = byId("charts");
  const pickLayer = (point) => choose({ layer: point.x });
  const pickCell = (point) => choose({ layer: point.y, step: currentRun().phases[state.phase].steps[point.x] });
  if (DATA.runs.length > 1)
    new Chart(target, {
      id: "runs-chart",
      title: "Runs over steps",
      full: true,
      of: ["run", "phase", "statistic"],
      build: meansOfRuns,
    });
  new Chart(target, {
    id: "per-layer",
    title: "Layer by layer",
    full: true,
    of: ["run", "phase", "step", "statistic", "others"],
    build: perLayer,
    marks: layerMark,
    click: pickLayer,
  });
  new Chart(target, {
    id: "over-steps",
    title: "Over steps",
    of: ["run", "phase", "layer", "statistic"],
    build: overSteps,
  });
  new Chart(target, { id: "spectrum", title: "Eigenspectrum", of: ["run", "step", "layer"], build: spectrum });
  new Chart(target, {
    id: "heatmap",
    title: "Layers by steps",
    full: true,
    of: ["run", "phase", "statistic"],
    build: heatmap,
    marks: cellMark,
    click: pickCell,
  });
  const names = [...new Set(DATA.runs.flatMap((run) => run.scalars.map((line) => line.name)))].slice(0, 24);
  byId("scalars-section").hidden = !names.length;
  names.forEach(
    (name, i) =>
      new Chart(byId("scalars"), { id: `scalar-${i}`, title: name, of: ["run", "others"], build: scalarChart(name) }),
  );
}

async function main() {
  const runs = DATA.runs;
  const title = runs.length === 1 ? `Layers of ${runs[0].name}` : `Layers of ${runs.length} runs`;
  document.title = title;
  byId("title").replaceChildren(nameOf(title));
  byId("about").textContent = `Written by delve_ray ${DATA.version}, ${DATA.written}.`;
  // A page that a browser has saved holds what is about to be made.
  for (const id of ["findings", "problems", "runs", "charts", "scalars"]) byId(id).replaceChildren();
  await openPool();
  begin();
  showFindings();
  showProblems();
  setUpControls();
  showRuns();
  setUpTable();
  setUpFigures();
  setUpCharts();
  document.documentElement.dataset.ready = "true";
  performance.mark("ready");
  (window.requestIdleCallback || setTimeout)(loadPlotly, { timeout: 500 });
}

main().catch((error) => {
  byId("problems").append(element("p", { class: "problem", text: `This page cannot show its data: ${error.message}` }));
  console.error(error);
});
