// The data of the page: texts as JSON, numbers as one compressed stream that is taken apart on demand.

const DATA = JSON.parse(document.getElementById("data").textContent);
const STATISTICS = new Map(DATA.statistics.map((words) => [words.name, words]));
const MEMORY = new Map();
let pool = null;

async function inflate(id) {
  if (!window.DecompressionStream) throw new Error("the browser is too old; one of 2023 or later is needed");
  const text = atob(document.getElementById(id).textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function openPool() {
  pool = await inflate("numbers");
}

// The numbers at a place of the stream; a null is null, which NaN is not.
class Numbers {
  constructor(place) {
    const { at, count, bytes } = place;
    const whole = new Uint8Array(count * bytes);
    for (let byte = 0; byte < bytes; byte++) {
      for (let i = 0, from = at + byte * count; i < count; i++) whole[i * bytes + byte] = pool[from + i];
    }
    this.values = bytes === 4 ? new Float32Array(whole.buffer) : new Float64Array(whole.buffer);
    this.words = new Uint32Array(whole.buffer);
    this.count = count;
  }

  at(i) {
    const value = this.values[i];
    if (value === value) return value;
    const wide = this.values.BYTES_PER_ELEMENT === 8;
    const isNull = wide
      ? this.words[2 * i] === 1 && this.words[2 * i + 1] === 0x7ff80000
      : this.words[i] === 0x7fc00001;
    return isNull ? null : NaN;
  }
}

function numbersAt(place) {
  if (!MEMORY.has(place.at)) MEMORY.set(place.at, new Numbers(place));
  return MEMORY.get(place.at);
}

// The value of a statistic for a layer in a window of a phase; null where there is none.
function valueAt(run, phase, statistic, layer, window) {
  const shown = run.phases[phase];
  const place = shown && shown.columns[statistic];
  if (!place || window < 0) return null;
  return numbersAt(place).at(layer * shown.steps.length + window);
}

// The last window of a phase that is not after a step: its index among the steps, or -1.
function windowAt(run, phase, step) {
  const steps = run.phases[phase] ? run.phases[phase].steps : [];
  let found = -1;
  while (found + 1 < steps.length && steps[found + 1] <= step) found++;
  return found;
}

// Whether a layer has fewer samples than features in a window.
function isScarce(run, phase, layer, window) {
  const samples = valueAt(run, phase, "samples", layer, window);
  return samples !== null && samples < run.layers[layer].features;
}

// The spectrum of a layer in the window nearest to a step: {step, ranks, values}, or null.
function spectrumAt(run, phase, layer, step) {
  const shown = run.phases[phase];
  if (!shown || !shown.eigensteps.length) return null;
  const steps = shown.eigensteps;
  const nearest = steps.reduce((best, one, i) => (Math.abs(one - step) < Math.abs(steps[best] - step) ? i : best), 0);
  const length = (index) => run.ranks[run.layers[index].features].length;
  let from = 0;
  for (let before = 0; before < layer; before++) from += length(before) * steps.length;
  from += length(layer) * nearest;
  const numbers = numbersAt(shown.eigenvalues);
  const values = Array.from({ length: length(layer) }, (_, i) => numbers.at(from + i));
  return { step: steps[nearest], ranks: run.ranks[run.layers[layer].features], values };
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function meanOf(values) {
  const numbers = values.filter(isNumber);
  return numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : null;
}

function meanAt(run, phase, statistic, window) {
  return meanOf(run.layers.map((_, layer) => valueAt(run, phase, statistic, layer, window)));
}

const WHOLE = new Intl.NumberFormat("en-US");
const FOUR_DIGITS = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 4 });

// A value as people read it: a share as per cent, a count with its thousands, other numbers to four digits.
function format(value, form) {
  if (value === null || value === undefined) return "–";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (form === "share") return `${(100 * value).toFixed(1)} %`;
  if (form === "count") return WHOLE.format(value).replace("-", "−");
  const size = Math.abs(value);
  const long = size !== 0 && (size >= 1e5 || size < 1e-3);
  const text = long ? value.toExponential(3) : FOUR_DIGITS.format(value);
  return text.replaceAll("-", "−");
}
