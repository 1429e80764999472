"use strict";
// Numbers, texts, and the three kinds of picture the page has.
const $ = id => document.getElementById(id);
const safe = text => String(text).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
// Made once each: toLocaleString makes one per call, which is most of an update's time.
const FORMATS = [0, 1, 2, 3].map(digits => new Intl.NumberFormat("en", {maximumFractionDigits: digits}));
const COMPACT = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 1});
const number = (x, digits = 0) => x == null ? "–" : FORMATS[digits].format(x);
const short = x => x == null ? "–" : Math.abs(x) < 10 ? number(x, 1) : Math.abs(x) < 1e4 ? number(x) :
  COMPACT.format(x);
const ms = x => x == null ? "–" : x < 1000 ? short(x) + " ms" : number(x / 1e3, x < 1e4 ? 1 : 0) + " s";
const clock = t => new Date(1e3 * t).toTimeString().slice(0, 8);
// Replaces what is shown only where it differs, so that nothing loses focus without need.
const put = (element, html) => { if (element.shown !== html) element.innerHTML = element.shown = html; };
const sum = values => values.reduce((a, b) => a + b, 0);
const middle = values => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] || 0;

const WIDTH = 560, HEIGHT = 150, LEFT = 48, BOTTOM = 18, TOP = 8;
const scaleOf = (samples, most) => {
  const unit = 10 ** Math.floor(Math.log10(most || 1));
  const limit = [1, 2, 5, 10].map(x => x * unit).find(x => x >= most) || 1;
  const end = samples.length ? samples[samples.length - 1].t : 0;
  const length = Math.max(60, samples.length ? end - samples[0].t : 60);
  return {limit, end, length,
    x: t => LEFT + (WIDTH - LEFT - 6) * (1 - (end - t) / length),
    y: v => TOP + (HEIGHT - TOP - BOTTOM) * (1 - v / limit)};
};
const path = (samples, scale, value) => {
  let text = "", pen = "M";
  for (const s of samples) {
    const v = value(s);
    if (v == null) continue;
    text += `${pen}${scale.x(s.t).toFixed(1)} ${scale.y(v).toFixed(1)}`;
    pen = "L";
  }
  return text;
};
const frame = (scale, say) => {
  let out = "";
  for (const v of [0, scale.limit / 2, scale.limit])
    out += `<line class="grid" x1="${LEFT}" x2="${WIDTH}" y1="${scale.y(v)}" y2="${scale.y(v)}"/>` +
      `<text x="${LEFT - 5}" y="${scale.y(v) + 4}" text-anchor="end">${say(v)}</text>`;
  for (const [part, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]])
    out += `<text x="${LEFT + (WIDTH - LEFT - 6) * part}" y="${HEIGHT - 4}" ` +
      `text-anchor="${anchor}">${clock(scale.end - scale.length * (1 - part))}</text>`;
  return out;
};

// A chart is {title, say, draw(samples) -> [svg, caption], read(sample) -> text}.
function bandChart(title, key, scaled, say) {
  const at = (s, i) => scaled(s[key][i]);
  return {title,
    draw(samples) {
      const scale = scaleOf(samples, Math.max(...samples.map(s => at(s, 3)), 1e-9));
      const up = path(samples, scale, s => at(s, 2)), down = path([...samples].reverse(), scale, s => at(s, 0));
      const last = samples[samples.length - 1];
      return [frame(scale, say) + `<path class="area" d="${up}${down.replace("M", "L")}Z"/>` +
        `<path class="worst-line" d="${path(samples, scale, s => at(s, 3))}"/>` +
        `<path class="line" d="${path(samples, scale, s => at(s, 1))}"/>`, scale,
        `median ${say(at(last, 1))}, worst ${say(at(last, 3))} (engine ${last[key][4]})`];
    },
    read: s => `${title.toLowerCase()}: median ${say(at(s, 1))}, 10 to 90 % ${say(at(s, 0))} to ` +
      `${say(at(s, 2))}, worst ${say(at(s, 3))} (engine ${s[key][4]})`};
}
function latencyChart(title, key) {
  const value = (s, i) => s[key] && s[key][i];
  return {title,
    draw(samples) {
      const scale = scaleOf(samples, Math.max(...samples.map(s => value(s, 1) || 0), 1));
      const last = [...samples].reverse().find(s => value(s, 0) != null);
      return [frame(scale, ms) + `<path class="line" d="${path(samples, scale, s => value(s, 0))}"/>` +
        `<path class="line dash" d="${path(samples, scale, s => value(s, 1))}"/>`, scale,
        last ? `median ${ms(value(last, 0))}, P90 ${ms(value(last, 1))} (dashed)` : "no request yet"];
    },
    read: s => value(s, 0) == null ? "" : `${title}: median ${ms(value(s, 0))}, P90 ${ms(value(s, 1))}`};
}
const LANES = [["requests", "requests"], ["preempted", "preemptions"], ["fallbacks", "fallbacks"],
  ["moved", "experts moved"]];
const laneChart = {title: "What happened",
  draw(samples) {
    const scale = scaleOf(samples, 1), high = (HEIGHT - TOP - BOTTOM) / LANES.length;
    let out = frame(scale, () => "");
    LANES.forEach(([key, name], lane) => {
      const most = Math.max(...samples.map(s => s[key]), 1), foot = TOP + high * (lane + 1) - 2;
      let marks = "";
      for (const s of samples) {
        if (!s[key]) continue;
        const tall = Math.max(2, (high - 6) * s[key] / most);
        marks += `M${scale.x(s.t).toFixed(1)} ${foot}v${-tall.toFixed(1)}`;
      }
      out += `<path class="worst-line" d="${marks}"/><text x="${LEFT - 5}" y="${foot - high / 2 + 6}" ` +
        `text-anchor="end">${short(sum(samples.map(s => s[key])))}</text>` +
        `<text x="${LEFT + 4}" y="${foot - high + 12}">${name}</text>`;
    });
    return [out, scale, LANES.map(([key, name]) => `${short(sum(samples.map(s => s[key])))} ${name}`).join(", ")];
  },
  read: s => LANES.filter(([key]) => s[key]).map(([key, name]) => `${number(s[key])} ${name}`).join(", ")};

const CHARTS = [
  latencyChart("TTFT", "ttft"),
  latencyChart("TPOT", "tpot"),
  laneChart,
  bandChart("Prefill ahead of a new prompt", "pressure_ms", v => v, ms),
  bandChart("Running requests", "running", v => v, short),
  bandChart("KV cache used", "kv", v => 100 * v, v => short(v) + " %"),
  bandChart("Step", "step_ms", v => v, ms),
];
let cursor = null, drawn = [];  // index into the samples drawn

function makeCharts() {
  $("charts").innerHTML = CHARTS.map((chart, i) => `<figure><figcaption><b>${chart.title}</b> ` +
    `<span class="soft" id="now-${i}"></span></figcaption><svg id="chart-${i}" tabindex="0" role="img" ` +
    `viewBox="0 0 ${WIDTH} ${HEIGHT}"><g></g><line class="cursor" y1="${TOP}" y2="${HEIGHT - BOTTOM}" ` +
    `visibility="hidden"/></svg></figure>`).join("");
  CHARTS.forEach((chart, i) => {
    const svg = $(`chart-${i}`);
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect(), scale = chart.scale;
      if (!scale || !drawn.length) return;
      const part = (WIDTH * (event.clientX - box.left) / box.width - LEFT) / (WIDTH - LEFT - 6);
      const wanted = scale.end - scale.length * (1 - part);
      const gaps = drawn.map(s => Math.abs(s.t - wanted));
      moveCursor(gaps.indexOf(Math.min(...gaps)));
    });
    svg.addEventListener("pointerleave", () => moveCursor(null));
    svg.addEventListener("keydown", event => {
      const step = {ArrowLeft: -1, ArrowRight: 1, PageUp: -15, PageDown: 15, Home: -1e9, End: 1e9}[event.key];
      if (event.key === "Escape") moveCursor(null);
      if (!step) return;
      event.preventDefault();
      const from = cursor == null ? drawn.length - 1 : cursor;
      moveCursor(Math.min(Math.max(from + step, 0), drawn.length - 1));
    });
  });
}
function moveCursor(index) {
  cursor = index;
  const sample = index == null ? null : drawn[index];
  CHARTS.forEach((chart, i) => {
    const line = $(`chart-${i}`).lastChild;
    line.setAttribute("visibility", sample ? "visible" : "hidden");
    if (sample && chart.scale) {
      const x = chart.scale.x(sample.t).toFixed(1);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
  });
  if (sample) $("moment").textContent = `${clock(sample.t)}: ` +
    CHARTS.map(chart => chart.read(sample)).filter(text => text).join("; ");
}
function drawCharts(samples) {
  const moment = cursor == null ? null : drawn[cursor].t;
  drawn = samples;
  if (!samples.length) return;
  CHARTS.forEach((chart, i) => {
    const [inner, scale, now] = chart.draw(samples);
    chart.scale = scale;
    const svg = $(`chart-${i}`);
    svg.firstChild.innerHTML = inner;
    svg.setAttribute("aria-label", `${chart.title}: ${now}`);
    $(`now-${i}`).textContent = now;
  });
  if (moment != null) moveCursor(Math.max(samples.findIndex(s => s.t >= moment), 0));
  put($("events"), samples.flatMap(s => [...(s.events || []).map(e => [s.t, e]),
    ...(s.commits ? [[s.t, `rearrangement of experts: ${number(s.moved)} moved`]] : [])])
    .slice(-8).reverse().map(([t, e]) => `<li><span class="soft">${clock(t)}</span> ${safe(e)}</li>`).join(""));
}

// One pixel a cell; the browser scales it. Blue below the mean, orange above.
function heatMap(canvas, rows, most) {
  const style = getComputedStyle(document.documentElement);
  const rgb = name => (style.getPropertyValue(name).trim().slice(1).replace(/^(.)(.)(.)$/, "$1$1$2$2$3$3")
    .match(/../g)).map(x => parseInt(x, 16));
  const mid = rgb("--mid"), low = rgb("--low"), high = rgb("--high");
  const width = rows[0].length, image = new ImageData(width, rows.length);
  rows.forEach((row, y) => row.forEach((percent, x) => {
    const part = percent < 100 ? 1 - percent / 100 : Math.min((percent - 100) / (most - 100), 1);
    const end = percent < 100 ? low : high, at = 4 * (y * width + x);
    for (let c = 0; c < 3; c++) image.data[at + c] = mid[c] + (end[c] - mid[c]) * part;
    image.data[at + 3] = 255;
  }));
  canvas.width = width;
  canvas.height = rows.length;
  canvas.style.height = `${Math.max(60, Math.min(rows.length * 5, 320))}px`;
  canvas.getContext("2d").putImageData(image, 0, 0);
}
