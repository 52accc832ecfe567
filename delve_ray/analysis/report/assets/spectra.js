// The charts of one layer's spectrum, of several runs, and of the user's scalars.

const RANK_TICKS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];

// The eigenvalues of the chosen layer, with k(δ) marked.
function spectrum(colours) {
  const run = currentRun();
  const layer = run.layers[state.layer];
  const found = phasesOf(run)
    .map((phase) => spectrumOf(run, phase))
    .filter((one) => one !== null);
  const data = found.flatMap((one) => spectrumTraces(run, one, colours));
  const elsewhere = found
    .filter((one) => one.step !== one.wanted)
    .map((one) => `${one.phase}: that of step ${one.step}, the nearest one on this page`);
  const values = found.flatMap((one) => one.y);
  const widest = Math.max(2, most(found.flatMap((one) => one.x)));
  const ticks = RANK_TICKS.filter((tick) => tick <= widest);
  const xaxis = logAxis(colours, "rank", 1, widest, { tickvals: ticks, ticktext: ticks.map(String) });
  const yaxis = values.length
    ? logAxis(colours, "eigenvalue", Math.max(least(values), most(values) * SMALLEST_SHOWN), most(values))
    : axis(colours, "eigenvalue");
  const said = values.length
    ? "the variance along each direction, largest first. Dotted: k(δ), the intrinsic dimensionality."
    : "there is none above zero here.";
  const caption = `Eigenvalues of the covariance of ${shorten(layer.name, 60)}: ${said} ${elsewhere.join("; ")}`;
  const layout = frame(colours, 400, { xaxis, yaxis, legend: legendBelow(colours) });
  return { data, layout, caption: caption.trim() };
}

// What a spectrum's lowest shown value is, in units of its largest: below that is rounding.
const SMALLEST_SHOWN = 1e-9;

// The positive eigenvalues of the chosen layer in a phase, and the step that they are of; null if there are none.
function spectrumOf(run, phase) {
  const window = windowAt(run, phase, state.step);
  if (window < 0) return null;
  const wanted = run.phases[phase].steps[window];
  const { step, ranks, values } = spectrumAt(run, phase, state.layer, wanted);
  const kept = ranks.map((_, i) => i).filter((i) => isNumber(values[i]) && values[i] > 0);
  if (!kept.length) return null;
  return { phase, wanted, step, x: kept.map((i) => ranks[i]), y: kept.map((i) => values[i]) };
}

function spectrumTraces(run, { phase, step, x, y }, colours) {
  const color = colours[phase];
  const width = run.layers[state.layer].features;
  const where = (rank) => `${phase}, step ${step}<br>eigenvalue ${rank} of ${width}`;
  const text = x.map((rank, i) => `${where(rank)}: ${format(y[i], "number")}`);
  const line = { color, width: 2, dash: phase === "train" ? "solid" : "dash" };
  const own = lineTrace(`${phase}, step ${step}`, x, y, text, { mode: "lines+markers", line, marker: { size: 4 } });
  const k = valueAt(run, phase, "intrinsic_dimensionality", state.layer, run.phases[phase].steps.indexOf(step));
  if (!(k > 0)) return [own];
  const name = `k(δ) = ${k}, ${phase}`;
  const ends = [Math.max(y.at(-1), y[0] * SMALLEST_SHOWN), y[0]];
  const dotted = { color, width: 1.5, dash: "dot" };
  return [own, lineTrace(name, [k, k], ends, [name, name], { mode: "lines", line: dotted })];
}

// The mean over layers, for each run; the chosen one lies on top.
function meansOfRuns(colours) {
  const words = currentWords();
  const having = DATA.runs.filter((run) => run.phases[state.phase] && run.phases[state.phase].columns[state.statistic]);
  const own = (run) => run === currentRun();
  const runs = [...having.filter((run) => !own(run)), ...having.filter(own)];
  const data = runs.map((run) => {
    const steps = run.phases[state.phase].steps;
    const values = steps.map((_, window) => meanAt(run, state.phase, state.statistic, window));
    const label = plain(shorten(run.label, 70));
    const text = values.map((value, i) => `${label}<br>step ${steps[i]}: ${format(value, words.form)}`);
    return lineTrace(plain(shorten(run.label, 40)), steps, values, text, runStyle(run, steps.length, colours));
  });
  const xaxis = stepAxis(
    colours,
    data.flatMap((trace) => trace.x),
  );
  const how = "the mean over the layers of each run; the chosen run is the thick line.";
  return {
    data,
    layout: frame(colours, 340, { xaxis, yaxis: valueAxis(colours, words, data) }),
    caption: `${capital(words.label)} in ${state.phase}, ${how}`,
  };
}

function runStyle(run, points, colours) {
  const own = run === currentRun();
  return {
    showlegend: own || DATA.runs.length <= MOST_LINES,
    opacity: own || fewRuns() ? 1 : 0.4,
    line: { color: runColour(run, colours), width: own ? 3 : 1.5 },
    marker: { size: markerSize(points) },
  };
}

// A user's scalar: a line for each run and rank.
function scalarChart(name) {
  return (colours) => {
    const runs = [...otherRuns(), currentRun()];
    const data = runs.flatMap((run) => {
      const lines = run.scalars.filter((line) => line.name === name);
      return lines.map((line) => scalarTrace(run, line, lines.length > 1, colours));
    });
    const xaxis = stepAxis(
      colours,
      data.flatMap((trace) => trace.x),
    );
    const layout = frame(colours, 290, { xaxis, yaxis: axis(colours, "", { zeroline: false }) });
    return { data, layout, caption: "" };
  };
}

function scalarTrace(run, line, ofSeveralRanks, colours) {
  const [steps, values] = [numbersAt(line.steps), numbersAt(line.values)];
  const x = Array.from({ length: steps.count }, (_, i) => steps.at(i));
  const y = Array.from({ length: values.count }, (_, i) => values.at(i));
  const ofRun = DATA.runs.length > 1 ? shorten(run.label, 40) : "";
  const label = [ofRun, ofSeveralRanks ? `rank ${line.rank}` : ""].filter(Boolean).join(", ");
  const text = y.map((value, i) => `${plain(label || shorten(line.name, 40))}<br>step ${x[i]}: ${format(value)}`);
  const style = runStyle(run, x.length, colours);
  if (DATA.runs.length === 1) style.line.color = colours.series[line.rank % MOST_COLOURS];
  return lineTrace(plain(label), x, y, text, { ...style, showlegend: Boolean(label) && style.showlegend });
}
