// What each chart shows of the state, as Plotly's data and layout.

const MOST_LINES = 12;
const MOST_LABELS = 40;

function hoverName(layer) {
  return plain(shorten(layer.name, 70));
}

function windowName(run, phase, window) {
  return `${phase}, step ${run.phases[phase].steps[window]}`;
}

function otherRuns() {
  return state.others ? DATA.runs.filter((run) => run !== currentRun()) : [];
}

function fewRuns() {
  return DATA.runs.length <= MOST_COLOURS;
}

// Of a few runs each has a colour; of many only the chosen one stands out.
function runColour(run, colours) {
  if (fewRuns()) return colours.series[DATA.runs.indexOf(run)];
  return run === currentRun() ? colours.eval : colours.muted;
}

function layerTicks(run, most) {
  const shown = someOf(run.layers.length, most);
  return { tickmode: "array", tickvals: shown, ticktext: shown.map((i) => plain(run.layers[i].short)) };
}

// A line with a text for each point; what is no finite number is a gap in it.
function lineTrace(name, x, y, text, more) {
  const points = { type: "scatter", x, y: finite(y), hoverinfo: "text", text };
  return { ...points, mode: x.length <= 30 ? "lines+markers" : "lines", name, showlegend: true, ...more };
}

// One statistic of all layers, in the order of the network, at the chosen step.
function perLayer(colours) {
  const run = currentRun();
  const words = currentWords();
  const windows = phasesOf(run).map((phase) => [phase, windowAt(run, phase, state.step)]);
  const shown = windows.filter(([, window]) => window >= 0);
  const data = [
    ...otherRuns().map((other) => otherRunTrace(run, other, words, colours)),
    ...shown.map(([phase, window]) => phaseTrace(run, phase, window, words, colours)),
  ].filter((trace) => trace !== null);
  const longest = Math.max(...run.layers.map((layer) => layer.short.length));
  const tilted = run.layers.length * longest > 150;
  const xaxis = axis(colours, "layer, from input to output", {
    ...layerTicks(run, MOST_LABELS),
    range: [-0.6, run.layers.length - 0.4],
    tickangle: tilted ? -55 : 0,
    showgrid: false,
    zeroline: false,
  });
  const yaxis = valueAxis(colours, words, data);
  const few = shown.some(([phase, window]) => run.layers.some((_, i) => isScarce(run, phase, i, window)));
  const said = few ? " Open markers: fewer samples than features." : "";
  return {
    data,
    layout: frame(colours, tilted ? 430 : 340, { xaxis, yaxis }),
    caption: `${capital(words.label)} at step ${state.step}; the dotted line is the chosen layer.${said}`,
  };
}

function otherRunTrace(run, other, words, colours) {
  const window = windowAt(other, state.phase, state.step);
  const at = new Map(other.layers.map((layer, i) => [layer.name, i]));
  const values = run.layers.map(({ name }) =>
    at.has(name) ? valueAt(other, state.phase, state.statistic, at.get(name), window) : null,
  );
  if (!values.some(isNumber)) return null;
  const label = plain(shorten(other.label, 70));
  const text = values.map((value, i) => `${label}<br>${hoverName(run.layers[i])}: ${format(value, words.form)}`);
  const name = `${plain(shorten(other.label, 30))}, ${state.phase}`;
  const x = run.layers.map((_, i) => i);
  const quiet = { mode: "lines", showlegend: fewRuns(), opacity: fewRuns() ? 0.8 : 0.4 };
  return lineTrace(name, x, values, text, { ...quiet, line: { color: runColour(other, colours), width: 1 } });
}

function phaseTrace(run, phase, window, words, colours) {
  const values = run.layers.map((_, i) => valueAt(run, phase, state.statistic, i, window));
  const scarce = run.layers.map((_, i) => isScarce(run, phase, i, window));
  const text = values.map((value, i) => {
    const said = `${hoverName(run.layers[i])}<br>${windowName(run, phase, window)}: ${format(value, words.form)}`;
    return scarce[i] ? `${said}<br>fewer samples than features` : said;
  });
  const name = DATA.runs.length > 1 ? `${plain(shorten(run.label, 30))}, ${phase}` : phase;
  const colour = DATA.runs.length > 1 && fewRuns() ? runColour(run, colours) : colours[phase];
  const x = run.layers.map((_, i) => i);
  return lineTrace(name, x, values, text, {
    mode: "lines+markers",
    line: { color: colour, width: 2.5, dash: phase === "train" ? "solid" : "dash" },
    marker: {
      size: run.layers.length > 60 ? 4 : 7,
      color: colour,
      symbol: scarce.map((few) => (few ? "circle-open" : "circle")),
    },
  });
}

function layerMark(colours) {
  return [
    {
      type: "line",
      x0: state.layer,
      x1: state.layer,
      y0: 0,
      y1: 1,
      yref: "paper",
      line: { color: colours.muted, width: 1, dash: "dot" },
    },
  ];
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function quantile(sorted, share) {
  const at = share * (sorted.length - 1);
  const below = Math.floor(at);
  return sorted[below] + (at - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
}

// One statistic over the steps of a phase: a line for each of a few layers; of many, their spread and the chosen one.
function overSteps(colours) {
  const run = currentRun();
  const words = currentWords();
  const steps = run.phases[state.phase].steps;
  const few = run.layers.length <= MOST_LINES;
  const own = few ? run.layers.map((_, i) => i) : [state.layer];
  const lines = own.map((i) => {
    const values = steps.map((_, window) => valueAt(run, state.phase, state.statistic, i, window));
    const where = (window) => `${hoverName(run.layers[i])}<br>${windowName(run, state.phase, window)}`;
    const text = values.map((value, window) => `${where(window)}: ${format(value, words.form)}`);
    const color = few ? depthColour(i, run.layers.length, colours.dark) : colours.eval;
    return lineTrace(plain(shorten(run.layers[i].short, few ? 16 : 26)), steps, values, text, {
      line: { color, width: i === state.layer ? 3.5 : 1.5 },
      marker: { size: markerSize(steps.length) },
    });
  });
  const data = few ? lines : [...bands(run, colours, steps, words), ...lines];
  const xaxis = stepAxis(colours, steps);
  const yaxis = valueAxis(colours, words, data);
  const what = few
    ? "The chosen layer is the thick line; dark is near the input."
    : "The spread over all layers, and the chosen layer.";
  return {
    data,
    layout: frame(colours, 400, { xaxis, yaxis, legend: legendBelow(colours) }),
    caption: `${capital(words.label)} in ${state.phase}. ${what}`,
  };
}

function bands(run, colours, steps, words) {
  const spreads = steps.map((_, window) =>
    run.layers
      .map((_, i) => valueAt(run, state.phase, state.statistic, i, window))
      .filter(isNumber)
      .sort((a, b) => a - b),
  );
  const kept = steps.map((_, window) => window).filter((window) => spreads[window].length);
  const x = kept.map((window) => steps[window]);
  const at = (share) => kept.map((window) => quantile(spreads[window], share));
  const edge = (share, name, fill) => ({
    type: "scatter",
    mode: "lines",
    name,
    x,
    y: at(share),
    line: { width: 0, color: colours.train },
    fill: fill ? "tonexty" : "none",
    fillcolor: fill,
    hoverinfo: "skip",
    showlegend: Boolean(fill),
  });
  const shade = (strength) => (colours.dark ? `rgba(111, 177, 245, ${strength})` : `rgba(23, 103, 184, ${strength})`);
  const median = at(0.5);
  const text = median.map(
    (value, i) => `median of ${spreads[kept[i]].length} layers<br>step ${x[i]}: ${format(value, words.form)}`,
  );
  return [
    edge(0, "least"),
    edge(1, "least to most", shade(0.14)),
    edge(0.25, "quarter"),
    edge(0.75, "middle half", shade(0.3)),
    {
      type: "scatter",
      mode: "lines",
      name: "median",
      x,
      y: median,
      line: { color: colours.train, width: 2 },
      hoverinfo: "text",
      text,
      showlegend: true,
    },
  ];
}

// One statistic of every layer at every step.
function heatmap(colours) {
  const run = currentRun();
  const words = currentWords();
  const steps = run.phases[state.phase].steps;
  const valueOf = (i, window) => valueAt(run, state.phase, state.statistic, i, window);
  const rows = run.layers.map((_, i) => steps.map((_, window) => valueOf(i, window)));
  const numbers = rows.flat().filter(isNumber);
  const log = words.log && numbers.length > 0 && numbers.every((value) => value > 0);
  const shade = (value) => (log ? Math.log10(value) : value);
  const text = rows.map((row, i) => {
    const name = hoverName(run.layers[i]);
    return row.map((value, window) => `${name}<br>step ${steps[window]}: ${format(value, words.form)}`);
  });
  const trace = {
    type: "heatmap",
    x: steps.map((_, i) => i),
    y: run.layers.map((_, i) => i),
    z: rows.map((row) => row.map((value) => (isNumber(value) ? shade(value) : null))),
    text,
    hoverinfo: "text",
    colorscale: "Viridis",
    colorbar: colourBar(colours, words, log ? numbers : []),
    hoverongaps: false,
  };
  const shown = someOf(steps.length, 12);
  const stepTicks = { tickmode: "array", tickvals: shown, ticktext: shown.map((i) => String(steps[i])) };
  const bare = { showgrid: false, zeroline: false };
  const xaxis = axis(colours, "step", { ...stepTicks, ...bare });
  const yaxis = axis(colours, "", { ...layerTicks(run, MOST_LABELS), ...bare, autorange: "reversed" });
  const how = `${capital(words.label)} in ${state.phase}, input at the top${log ? "; colours by its logarithm" : ""}.`;
  return {
    data: [trace],
    layout: frame(colours, Math.max(240, Math.min(660, 90 + 18 * run.layers.length)), { xaxis, yaxis }),
    caption: `${how} A click chooses layer and step; what is empty has no finite value.`,
  };
}

// `logged` are the numbers whose logarithms are the colours, if they are.
function colourBar(colours, words, logged) {
  const bar = { outlinewidth: 0, thickness: 14, tickfont: { color: colours.muted } };
  if (logged.length) {
    const ticks = logTicks(least(logged), most(logged));
    return { ...bar, tickmode: "array", tickvals: ticks.map(Math.log10), ticktext: ticks.map(tickText) };
  }
  return words.form === "share" ? { ...bar, tickformat: ".0%" } : bar;
}

function cellMark(colours) {
  const window = windowAt(currentRun(), state.phase, state.step);
  const box = {
    type: "rect",
    x0: window - 0.5,
    x1: window + 0.5,
    y0: state.layer - 0.5,
    y1: state.layer + 0.5,
    line: { color: colours.text, width: 2 },
  };
  return window < 0 ? [] : [box];
}
