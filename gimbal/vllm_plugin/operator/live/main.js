// Asks the server every two seconds while somebody looks, and draws what it says.
// Behind a proxy the server may live under a path of its own.
const root = location.pathname.replace(/\/gimbal\/?$/, "");
const KEEP = {fine: 300, coarse: 720};
let span = "fine", since = null, taken = -1, samples = [], view = null, asking = null;

// Script time of an update, for whoever wonders what the page costs.
function measured(draw) {
  const began = performance.now();
  draw();
  const spent = performance.now() - began, data = document.documentElement.dataset;
  data.scriptMs = spent.toFixed(1);
  data.scriptMostMs = Math.max(spent, data.scriptMostMs || 0).toFixed(1);
}
function trouble(lines, failed) {
  put($("trouble"), lines.map((line, i) => `<li class="${i < failed ? "first" : ""}">${safe(line)}</li>`).join(""));
}
function drawHead() {
  $("version").textContent = view.version;
  const failed = Object.values(view.levels).filter(state => state.includes("itself")).length;
  put($("levels"), Object.entries(view.levels).map(([level, state]) =>
    `<span class="chip ${state === "on" ? "" : state === "off" ? "off" : "failed"}">${safe(level)}` +
    `${state === "on" ? "" : " " + safe(state)}</span>`).join(" "));
  const names = Object.entries(view.policies).map(([kind, name]) => `${kind} ${name}`);
  $("policies").textContent = names.join(", ") || "vLLM decides everything";
  $("front-ends").textContent = view.front_ends > 1 ? `${view.front_ends} API servers together` : "";
  trouble(view.trouble, failed);
  document.title = `${view.trouble.length ? "(!) " : ""}Gimbal`;
}
function drawTiles(engines) {
  const lately = [...samples].reverse().find(s => s.ttft && s.ttft[0] != null) || {};
  const window = samples.slice(-30), seconds = Math.max(window.length, 1) * (span === "fine" ? view.every_s : 60);
  const pressures = engines.map(e => e.pressure_ms), mean = sum(pressures) / engines.length;
  const waits = (key, i) => lately[key] ? ms(lately[key][i]) : "–";
  const tiles = [
    ["TTFT", waits("ttft", 0), `P90 ${waits("ttft", 1)}`],
    ["TPOT", waits("tpot", 0), `P90 ${waits("tpot", 1)}`],
    ["requests", number(sum(window.map(s => s.requests)) / seconds, 1), "per s"],
    ["waiting", number(sum(engines.map(e => e.waiting_requests))), `${number(sum(engines.map(e => e.running_requests)))} running`],
    ["busiest over mean", mean ? number(Math.max(...pressures) / mean, 2) : "–", "prefill ahead"],
    ["fullest KV cache", number(100 * Math.max(...engines.map(e => e.kv))) + " %", ""],
    ["preemptions", number(sum(window.map(s => s.preempted))), `in ${number(seconds / 60, 1)} min`],
    ["fallbacks", number(sum(window.map(s => s.fallbacks))), `in ${number(seconds / 60, 1)} min`],
  ];
  put($("tiles"), tiles.map(([name, value, note]) =>
    `<div><dt>${name}</dt><dd>${value} <small>${note}</small></dd></div>`).join(""));
}
function draw() {
  if (!view) return;
  const engines = view.engines.map(row => Object.fromEntries(view.columns.map((name, i) => [name, row[i]])));
  drawHead();
  drawTiles(engines);
  drawEngines(engines);
  drawCharts(samples);
  drawDecisions(view);
  drawQueue(view, engines);
  drawPlacement(view);
  drawControl();
}
const redraw = () => measured(draw);

// Control: only where the server has `admin: true` and a key, which the person types in.
function drawControl() {
  const control = view.control;
  $("control").hidden = !control;
  if (!control || $("switches").children.length) return;
  const now = control.now.levels || Object.keys(view.levels);
  $("switches").innerHTML = "<fieldset><legend>Levels</legend>" + control.levels.map(level =>
    `<label><input type="checkbox" name="level" value="${safe(level)}" ${now.includes(level) ? "checked" : ""}> ` +
    `${safe(level)}</label>`).join("") + "</fieldset>" + (control.policies.length ? `<label>Dispatch policy <select ` +
    `name="policy">${control.policies.map(name => `<option ${name === view.policies.dispatch ? "selected" : ""}>` +
    `${safe(name)}</option>`).join("")}</select></label>` : "") + `<label>API key <input name="key" type="password" ` +
    `autocomplete="off" required></label><button>Switch</button> <span id="switched" role="status"></span>`;
}
async function applySwitches(event) {
  event.preventDefault();
  const form = new FormData($("switches"));
  const fixed = Object.keys(view.levels).filter(level => !view.control.levels.includes(level));
  const message = {levels: [...fixed, ...form.getAll("level")]};
  if (form.get("policy") && form.get("policy") !== view.policies.dispatch) message.policy = form.get("policy");
  try {
    const reply = await fetch(root + "/gimbal/control", {method: "POST", body: JSON.stringify(message),
      headers: {"Content-Type": "application/json", Authorization: `Bearer ${form.get("key")}`}});
    const said = await reply.json();
    const left = said.not_followed?.length ? `engines that did not follow: ${said.not_followed.join(", ")}` : "";
    $("switched").textContent = reply.ok ? left || "in force before the next request" : said.error;
  } catch (error) {
    $("switched").textContent = error.message;
  }
}
async function refresh() {
  clearTimeout(asking);
  if (!document.hidden) {
    const asked = span;
    try {
      const reply = await fetch(`${root}/gimbal/view?span=${asked}&after=${taken}`, {cache: "no-store"});
      const answer = await reply.json();
      if (!reply.ok) throw new Error(answer.error || `HTTP ${reply.status}`);
      if (answer.levels == null) return trouble(["This server was started without Gimbal."], 1);
      if (asked !== span) return refresh();
      // Another start of the server, or another API server, counts its samples anew.
      if (answer.since_s !== since && taken >= 0) {
        [since, taken, samples] = [answer.since_s, -1, []];
        return refresh();
      }
      [since, taken, view] = [answer.since_s, answer.taken, answer];
      samples = [...samples, ...answer.samples].slice(-KEEP[span]);
      redraw();
    } catch (error) {
      trouble([`No answer from the server (${error.message}).`, ...(view ? view.trouble : [])], 1);
    }
  }
  asking = setTimeout(refresh, view ? 1e3 * view.every_s : 2000);
}
makeCharts();
makeEngines(redraw);
makeDecisions(redraw);
makeExperts();
$("switches").addEventListener("submit", applySwitches);
for (const button of document.querySelectorAll("[data-span]"))
  button.addEventListener("click", () => {
    [span, taken, samples, cursor] = [button.dataset.span, -1, [], null];
    for (const other of document.querySelectorAll("[data-span]"))
      other.setAttribute("aria-pressed", other === button);
    refresh();
  });
document.addEventListener("visibilitychange", refresh);
refresh();
