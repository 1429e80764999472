// The strip of engines: cell i holds the i-th fullest engine, whichever that is.
const owes = e => e.waiting_requests + e.running_requests + (e.unacknowledged_requests || 0) > 0;
const silent = e => e.age_us != null && e.age_us > 2e6 && owes(e) && !e.idle;
const HEAT = {
  pressure: ["prefill ahead", e => e.pressure_ms, ms, 100],
  kv: ["KV cache used", e => 100 * e.kv, v => number(v) + " %", 100],
  running: ["running requests", e => e.running_requests, short, 8],
  waiting: ["waiting requests", e => e.waiting_requests, short, 8],
  wait: ["longest wait", e => e.queue_oldest_wait_us / 1e3, ms, 1000],
  step: ["step time", e => e.step_time_us / 1e3, ms, 20],
  expert: ["expert pressure per step", e => e.expert_pressure_us / 1e3, ms, 1],
};
const COLUMNS = [
  ["prefill ahead", "", e => ms(e.pressure_ms)],
  ["waiting", "requests", e => number(e.waiting_requests)],
  ["to prefill", "tokens", e => number(e.waiting_prefill_tokens + e.running_prefill_tokens)],
  ["running", "requests", e => number(e.running_requests)],
  ["decoding", "requests", e => number(e.decoding_requests)],
  ["KV cache", "used", e => number(100 * e.kv, 1) + " %"],
  ["step", "", e => ms(e.step_time_us / 1e3)],
  ["prefill", "tokens/s", e => number(e.prefill_tokens_per_s)],
  ["expert pressure", "per step", e => ms(e.expert_pressure_us / 1e3)],
  ["longest wait", "and its bound", e => ms(e.queue_oldest_wait_us / 1e3) +
    (e.queue_oldest_bound_us ? " of " + ms(e.queue_oldest_bound_us / 1e3) : "")],
  ["in flight", "tokens", e => number(e.inflight_tokens)],
  ["sent", "requests", e => number(e.sent)],
  ["preempted", "requests", e => number(e.preemptions)],
  ["signal", "old", e => e.age_us == null ? "none yet" : !owes(e) ? "idle" : ms(e.age_us / 1e3)],
];
let chosen = null;  // rank of the engine shown in full

function drawEngines(engines) {
  const [name, value, say, floor] = HEAT[$("heat-by").value];
  const sorted = [...engines].sort((a, b) => value(b) - value(a) || a.engine - b.engine);
  const limit = Math.max(floor, ...engines.map(value));
  const strip = $("strip");
  while (strip.children.length < sorted.length) strip.append(document.createElement("button"));
  while (strip.children.length > sorted.length) strip.lastChild.remove();
  sorted.forEach((engine, i) => {
    const cell = strip.children[i], heat = (value(engine) / limit).toFixed(3);
    cell.type = "button";
    cell.tabIndex = i ? -1 : 0;
    cell.dataset.engine = engine.engine;
    cell.className = silent(engine) ? "silent" : "";
    cell.style.setProperty("--heat", heat);
    cell.setAttribute("aria-pressed", engine.engine === chosen);
    cell.setAttribute("aria-label", `engine ${engine.engine}, ${name} ${say(value(engine))}` +
      (silent(engine) ? ", silent" : ""));
    put(cell, `${engine.engine}<small>${safe(say(value(engine)))}</small>`);
  });
  const typical = middle(engines.map(value));
  const far = sorted.filter(e => silent(e) || (value(e) > 2 * typical && value(e) > floor / 4)).slice(0, 5);
  put($("outliers"), far.length ? "Stand out: " + far.map(e => `<b>engine ${e.engine}</b> (${say(value(e))}` +
    (typical ? `, ${number(value(e) / typical, 1)} times the median` : "") + (silent(e) ? ", silent" : "") +
    ")").join(", ") + "." : `No engine stands out; the median is ${say(typical)}.`);
  const one = engines.find(e => e.engine === chosen);
  put($("engine"), one ? `<h3>Engine ${one.engine}</h3><dl>` + COLUMNS.map(([title, unit, cell]) =>
    `<div><dt>${title}</dt><dd>${safe(cell(one))} <small>${unit}</small></dd></div>`).join("") + "</dl>" : "");
  const table = $("engine-table");
  if (!table.closest("details").open) return;
  put(table, "<tr><th scope=col>engine<small>DP rank</small></th>" + COLUMNS.map(([title, unit]) =>
    `<th scope=col>${title}<small>${unit}</small></th>`).join("") + "</tr>" + sorted.map(e =>
    `<tr><th scope=row>${e.engine}</th>` + COLUMNS.map(([, , cell]) => `<td>${safe(cell(e))}</td>`).join("") +
    "</tr>").join(""));
}
function makeEngines(redraw) {
  $("heat-by").innerHTML = Object.entries(HEAT).map(([key, [name]]) =>
    `<option value="${key}">${name}</option>`).join("");
  $("heat-by").addEventListener("change", redraw);
  $("engine-table").closest("details").addEventListener("toggle", redraw);
  $("strip").addEventListener("click", event => {
    const cell = event.target.closest("button");
    if (!cell) return;
    chosen = chosen === +cell.dataset.engine ? null : +cell.dataset.engine;
    redraw();
  });
  $("strip").addEventListener("keydown", event => {
    const cells = [...$("strip").children], at = cells.indexOf(document.activeElement);
    const line = getComputedStyle($("strip")).gridTemplateColumns.split(" ").length;
    const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -line, ArrowDown: line, Home: -1e6, End: 1e6}[event.key];
    if (!step || at < 0) return;
    event.preventDefault();
    cells[Math.min(Math.max(at + step, 0), cells.length - 1)].focus();
  });
}
