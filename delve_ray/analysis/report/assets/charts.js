// Charts that are drawn when they come into sight, and again when what they show has changed.

const CONFIG = {
  displaylogo: false,
  showSendToCloud: false,
  plotlyServerURL: "",
  responsive: true,
  typesetMath: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};
const PRINTED_WIDTH = 960;
const VIRIDIS = [
  "#440154",
  "#482878",
  "#3e4a89",
  "#31688e",
  "#26828e",
  "#1f9e89",
  "#35b779",
  "#6dcd59",
  "#b4de2c",
  "#fde725",
];
const RUN_COLOURS = {
  light: ["#1767b8", "#c2570c", "#2c8a4b", "#a33bb5", "#94690a", "#0f8390", "#d2416b", "#6b6f7a"],
  dark: ["#6fb1f5", "#f5a15c", "#6fce8e", "#d993e6", "#e0bb52", "#5fcbd6", "#f58fae", "#b4b9c4"],
};
const MOST_COLOURS = RUN_COLOURS.light.length;
const charts = [];
let plotlyReady = null;

// The library is evaluated when the first chart needs it, or when the page has nothing else to do.
function loadPlotly() {
  plotlyReady ??= inflate("plotly").then((bytes) => {
    document.head.append(element("script", { text: new TextDecoder().decode(bytes) }));
    return window.Plotly;
  });
  return plotlyReady;
}

// Plotly reads some HTML in every text that it shows; escaped, all of it is shown as it is.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  const dark =
    matchMedia("(prefers-color-scheme: dark)").matches && !document.documentElement.classList.contains("printing");
  const colours = {
    text: of("text"),
    muted: of("muted"),
    grid: of("grid"),
    line: of("line"),
    page: of("page"),
    train: of("train"),
    eval: of("eval"),
  };
  return { ...colours, dark, series: dark ? RUN_COLOURS.dark : RUN_COLOURS.light };
}

// A colour for a layer by its depth; the end that the background would swallow is left out.
function depthColour(index, count, dark) {
  const [from, to] = dark ? [0.25, 1] : [0, 0.82];
  const at = (from + ((to - from) * index) / Math.max(1, count - 1)) * (VIRIDIS.length - 1);
  const below = Math.min(VIRIDIS.length - 2, Math.floor(at));
  const parts = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  const low = parts(VIRIDIS[below]);
  const high = parts(VIRIDIS[below + 1]);
  return `rgb(${low.map((value, i) => Math.round(value + (at - below) * (high[i] - value))).join(", ")})`;
}

function axis(colours, title, more = {}) {
  const quiet = { gridcolor: colours.grid, linecolor: colours.line, zerolinecolor: colours.line, automargin: true };
  return { ...quiet, tickfont: { color: colours.muted }, title: { text: plain(title), standoff: 10 }, ...more };
}

function frame(colours, height, more) {
  return {
    height,
    margin: { l: 56, r: 16, t: 12, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.text },
    hoverlabel: {
      bgcolor: colours.page,
      bordercolor: colours.line,
      font: { color: colours.text },
      align: "left",
      namelength: -1,
    },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: colours.text } },
    modebar: { bgcolor: colours.page, color: colours.muted, activecolor: colours.text },
    ...more,
  };
}

// An axis of steps, which are whole numbers and so are its ticks.
function stepAxis(colours, steps) {
  const span = most(steps) - least(steps);
  if (!(span > 0)) return axis(colours, "step", { zeroline: false, tickvals: steps });
  const rough = span / 8;
  const power = 10 ** Math.floor(Math.log10(rough));
  const nice = [1, 2, 5, 10].map((factor) => factor * power).find((tick) => tick >= rough);
  return axis(colours, "step", { zeroline: false, dtick: Math.max(1, Math.round(nice)), tickformat: "~d" });
}

function markerSize(points) {
  return points <= 3 ? 8 : 4;
}

// Where a logarithmic axis has its ticks: at decades, and between them where there are few.
function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const every = Math.max(1, Math.ceil(decades / 8));
  const factors = decades > 4 ? [1] : decades > 1.5 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    if (power % every === 0) ticks.push(...factors.map((factor) => factor * 10 ** power));
  }
  return ticks.filter((tick) => tick >= low * 0.99 && tick <= high * 1.01);
}

function tickText(value) {
  const power = Math.log10(value);
  const short = value >= 1e-3 && value < 1e5;
  if (short) return Number(value.toPrecision(3)).toLocaleString("en-US", { maximumFractionDigits: 6 });
  const whole = Math.floor(power + 1e-9);
  const factor = Number((value / 10 ** whole).toPrecision(2));
  return `${factor === 1 ? "" : `${factor}·`}10<sup>${String(whole).replace("-", "−")}</sup>`;
}

function logAxis(colours, title, low, high, more = {}) {
  const ticks = logTicks(low, high);
  const range = [
    Math.log10(low) - 0.03 * Math.log10(high / low) - 0.02,
    Math.log10(high) + 0.03 * Math.log10(high / low) + 0.02,
  ];
  return axis(colours, title, {
    type: "log",
    range,
    tickmode: "array",
    tickvals: ticks,
    ticktext: ticks.map(tickText),
    zeroline: false,
    ...more,
  });
}

// Up to so many indices, evenly spread, with the first and the last.
function someOf(count, most) {
  if (count <= most) return Array.from({ length: count }, (_, i) => i);
  return [...new Set(Array.from({ length: most }, (_, i) => Math.round((i * (count - 1)) / (most - 1))))];
}

function finite(values) {
  return values.map((value) => (isNumber(value) ? value : null));
}

function least(values) {
  return values.reduce((a, b) => Math.min(a, b), Infinity);
}

function most(values) {
  return values.reduce((a, b) => Math.max(a, b), -Infinity);
}

function legendBelow(colours) {
  return { orientation: "h", x: 0, y: -0.2, yanchor: "top", font: { color: colours.text } };
}

// The axis of a statistic's values, which are those of all lines.
function valueAxis(colours, words, traces) {
  const numbers = traces.flatMap((trace) => trace.y).filter(isNumber);
  const log = words.log && numbers.length > 0 && numbers.every((value) => value > 0);
  if (log) return logAxis(colours, words.label, least(numbers), most(numbers));
  return axis(
    colours,
    words.label,
    words.form === "share" ? { tickformat: ".0%", rangemode: "tozero" } : { rangemode: "tozero" },
  );
}

// A chart: `build` returns {data, layout, caption} and is asked again when what `of` names of the state has changed;
// `marks` are the shapes upon it, which change more often; `click` gets the point that was clicked.
class Chart {
  constructor(target, { id, title, full, of, build, marks, click }) {
    Object.assign(this, { of, build, marks, click, visible: false, drawnOf: null, drawnMarks: null });
    this.caption = element("figcaption", {}, element("h3", { text: title }), element("p", {}));
    this.plot = element("div", { class: "plot", id, role: "img" });
    this.plot.style.minHeight = "300px";
    target.append(element("figure", { class: full ? "full" : "" }, this.caption, this.plot));
    charts.push(this);
    this.check();
  }

  // Whether it shows something else than it should.
  check(anew = false) {
    if (anew) this.drawnOf = null;
    this.stale = this.drawnOf !== this.wanted() || this.drawnMarks !== JSON.stringify(this.shapes());
    this.plot.setAttribute("aria-busy", String(this.stale));
  }

  wanted() {
    return JSON.stringify(this.of.map((name) => state[name]));
  }

  shapes() {
    return this.marks ? this.marks(theme()) : [];
  }

  draw(printing = false) {
    if (!window.Plotly) return;
    const shapes = this.shapes();
    if (this.drawnOf === this.wanted() && !printing) window.Plotly.relayout(this.plot, { shapes });
    else this.drawAll(shapes, printing);
    this.drawnOf = printing ? null : this.wanted();
    this.drawnMarks = JSON.stringify(shapes);
    this.check();
  }

  drawAll(shapes, printing) {
    const { data, layout, caption } = this.build(theme());
    const title = this.caption.querySelector("h3").textContent;
    this.caption.querySelector("p").textContent = caption;
    this.plot.setAttribute("aria-label", `${title}. ${caption} The table of layers has the numbers.`);
    this.plot.style.minHeight = "0";
    if (printing) layout.width = PRINTED_WIDTH;
    window.Plotly.react(this.plot, data, { ...layout, shapes }, CONFIG);
    if (this.click && !this.listening) this.plot.on("plotly_click", (event) => this.click(event.points[0]));
    this.listening = true;
  }
}

let asked = false;

// Draw what is in sight and stale, once for all changes of a frame.
function refresh() {
  if (asked || !charts.some((chart) => chart.visible && chart.stale)) return;
  asked = true;
  loadPlotly().then(() =>
    requestAnimationFrame(() => {
      asked = false;
      for (const chart of charts) if (chart.visible && chart.stale) chart.draw();
    }),
  );
}

function checkAll(anew = false) {
  for (const chart of charts) chart.check(anew);
  refresh();
}

function setUpCharts() {
  const byPlot = new Map(charts.map((chart) => [chart.plot, chart]));
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) byPlot.get(entry.target).visible = entry.isIntersecting;
      refresh();
    },
    { rootMargin: "150px" },
  );
  for (const chart of charts) observer.observe(chart.plot);
  listeners.push(() => checkAll());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => checkAll(true));
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    for (const chart of charts) chart.draw(true);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    checkAll(true);
  });
}
