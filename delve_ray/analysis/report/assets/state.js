// What is chosen, and who wants to know when that changes.

const state = { run: 0, phase: "", step: 0, layer: 0, statistic: "saturation", others: true };
const listeners = [];

function currentRun() {
  return DATA.runs[state.run];
}

function currentWords() {
  return STATISTICS.get(state.statistic);
}

function phasesOf(run) {
  return Object.keys(run.phases);
}

function stepsOf(run) {
  const steps = new Set(phasesOf(run).flatMap((phase) => run.phases[phase].steps));
  return [...steps].sort((a, b) => a - b);
}

// The statistics that a run has anywhere.
function statisticsOf(run) {
  const shown = DATA.statistics.map((words) => words.name);
  const had = shown.filter((name) => hasSome(run, name));
  return had.length ? had : ["saturation"];
}

function hasSome(run, statistic) {
  return phasesOf(run).some((phase) => statistic in run.phases[phase].columns);
}

// Change what is chosen; what the new run does not have falls back to what it has.
function choose(changes) {
  const before = currentRun();
  const layerName = before.layers[state.layer] && before.layers[state.layer].name;
  Object.assign(state, changes);
  const run = currentRun();
  if (run !== before) {
    state.layer = Math.max(
      0,
      run.layers.findIndex((layer) => layer.name === layerName),
    );
    state.step = stepsOf(run).at(-1);
    if (!hasSome(run, state.statistic)) state.statistic = statisticsOf(run)[0];
  }
  if (!run.phases[state.phase]) state.phase = phasesOf(run)[0];
  for (const listener of listeners) listener(run !== before);
}

function begin() {
  const run = currentRun();
  state.phase = phasesOf(run)[0];
  state.step = stepsOf(run).at(-1);
  if (!hasSome(run, state.statistic)) state.statistic = statisticsOf(run)[0];
}

// The controls show the state, and change it.
function setUpControls() {
  const control = {
    run: byId("run"),
    phase: byId("phase"),
    step: byId("step"),
    layer: byId("layer"),
    statistic: byId("statistic"),
  };
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("run-choice").hidden = DATA.runs.length < 2;
  fillSelect(
    control.run,
    DATA.runs.map((run, i) => [String(i), run.label]),
    String(state.run),
  );
  byId("others-choice").hidden = DATA.runs.length < 2;
  byId("others").addEventListener("change", () => choose({ others: byId("others").checked }));
  control.run.addEventListener("change", () => choose({ run: Number(control.run.value) }));
  control.phase.addEventListener("change", () => choose({ phase: control.phase.value }));
  control.layer.addEventListener("change", () => choose({ layer: Number(control.layer.value) }));
  control.statistic.addEventListener("change", () => choose({ statistic: control.statistic.value }));
  control.step.addEventListener("input", () => choose({ step: stepsOf(currentRun())[Number(control.step.value)] }));
  const show = (newRun) => {
    const run = currentRun();
    const steps = stepsOf(run);
    if (newRun) {
      fillSelect(
        control.phase,
        phasesOf(run).map((phase) => [phase, phase]),
        state.phase,
      );
      fillSelect(
        control.layer,
        run.layers.map((layer, i) => [String(i), shorten(layer.name, 80)]),
        String(state.layer),
      );
      fillSelect(
        control.statistic,
        statisticsOf(run).map((name) => [name, STATISTICS.get(name).label]),
        state.statistic,
      );
      control.step.max = String(steps.length - 1);
      control.step.disabled = steps.length < 2;
    }
    control.run.value = String(state.run);
    control.phase.value = state.phase;
    control.layer.value = String(state.layer);
    control.statistic.value = state.statistic;
    control.step.value = String(steps.indexOf(state.step));
    byId("step-value").textContent = `${state.step} of ${steps.at(-1)}`;
    control.step.setAttribute("aria-valuetext", `step ${state.step}`);
    byId("statistic-label").textContent = currentWords().label;
    byId("statistic-meaning").textContent = currentWords().meaning;
  };
  listeners.push(show);
  show(true);
}
