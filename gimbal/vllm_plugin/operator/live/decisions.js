// Recent decisions: every term in microseconds for the engine chosen and the runner-up.
const TERM_COLOURS = ["#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#999999"];
const WHY = {policy: "lowest cost", session: "kept with its session", stale: "signals too old",
  inflight: "fewest tokens in flight"};
const colourOf = (row, i) => TERM_COLOURS[i % TERM_COLOURS.length];
const open = new Set();
const keyOf = row => `${row.time_s}/${row.engine}/${row.prompt_tokens}`;

function bars(row) {
  const both = [row.cost_by_term, row.runner_up_by_term].map(terms => terms.map(v => Math.max(v || 0, 0)));
  const most = Math.max(...both.map(sum), 1e-9);
  const rects = both.map((terms, line) => {
    let x = 0;
    return terms.map((value, i) => {
      const wide = 300 * value / most, rect =
        `<rect x="${x.toFixed(1)}" y="${line * 12}" width="${wide.toFixed(1)}" height="9" ` +
        `fill="${colourOf(row, i)}" opacity="${line ? 0.55 : 1}"/>`;
      x += wide;
      return rect;
    }).join("");
  });
  return `<svg viewBox="0 0 300 22" preserveAspectRatio="none" aria-hidden="true">${rects.join("")}</svg>`;
}
function decision(row) {
  const unit = row.terms.length ? " µs" : "";
  const ahead = row.runner_up == null ? "the only engine" :
    `${number(Math.abs(row.runner_up_cost - row.cost))}${unit} ` +
    `${row.runner_up_cost >= row.cost ? "below" : "above"} engine ${row.runner_up}`;
  const head = `<span><span class="soft">${clock(row.time_s)}</span> ${number(row.prompt_tokens)} tokens ` +
    `(${number(row.cached_tokens)} cached) → <b>engine ${row.engine}</b>, ${WHY[row.reason] || safe(row.reason)}: ` +
    `${ahead} <span class="soft">${safe(row.policy)}</span></span>`;
  const cell = v => `<td>${number(v, 1)}</td>`;
  const line = (name, a, b) => `<tr><th scope=row>${name}</th>${cell(a)}${cell(b)}` +
    cell(a == null || b == null ? null : b - a) + "</tr>";
  const table = `<table><tr><th scope=col>term<small>µs</small></th><th scope=col>engine ${row.engine}` +
    `<small>chosen</small></th><th scope=col>engine ${row.runner_up ?? "–"}<small>runner-up</small></th>` +
    "<th scope=col>difference</th></tr>" + row.terms.map((term, i) =>
    line(`<i style="color:${colourOf(row, i)}">■</i> ${safe(term)}`, row.cost_by_term[i], row.runner_up_by_term[i]))
    .join("") + line("sum", row.cost, row.runner_up_cost) + "</table>";
  return `<li><details data-key="${keyOf(row)}" ${open.has(keyOf(row)) ? "open" : ""}><summary>${head}` +
    `${bars(row)}</summary><div class="wide">${table}</div><p class="soft">Oldest signal that mattered: ` +
    `${ms(row.signal_age_us == null ? null : row.signal_age_us / 1e3)}.</p></details></li>`;
}
function drawDecisions(view) {
  const list = $("recent"), held = $("hold").getAttribute("aria-pressed") === "true";
  if (!held || !list.children.length) {
    const focused = document.activeElement && document.activeElement.closest("#recent details");
    const key = focused && focused.dataset.key;
    put(list, view.recent.map(decision).join("") ||
      `<li class="soft">${view.policies.dispatch ? "No request yet." : "vLLM dispatches: nothing to explain."}</li>`);
    const again = key && [...list.querySelectorAll("details")].find(d => d.dataset.key === key);
    if (again) again.firstChild.focus();
    const named = view.recent.find(row => row.terms.length);
    put($("terms"), named ? named.terms.map((term, i) =>
      `<i style="background:${colourOf(named, i)}"></i>${safe(term)}`).join("") : "");
  }
  const total = sum(Object.values(view.decisions));
  put($("reasons"), total ? "<tr><th scope=col>policy: reason</th><th scope=col>requests</th><th scope=col>share</th></tr>" +
    Object.entries(view.decisions).map(([name, count]) => `<tr><th scope=row>${safe(name)}</th><td>${number(count)}` +
    `</td><td>${number(100 * count / total, 1)} %</td></tr>`).join("") : "");
}
function makeDecisions(redraw) {
  $("hold").addEventListener("click", () => {
    const held = $("hold").getAttribute("aria-pressed") === "true";
    $("hold").setAttribute("aria-pressed", !held);
    redraw();
  });
  $("recent").addEventListener("toggle", event => {
    const {key} = event.target.dataset;
    if (event.target.open) open.add(key); else open.delete(key);
    if (open.size > 50) open.clear();
  }, true);
}
