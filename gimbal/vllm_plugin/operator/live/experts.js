// Experts: what rearrangements were to bring and brought, and the load per layer on request.
const ASK_MS = 30000;
let askTimer = null;

function drawPlacement(view) {
  const p = view.placement;
  const tile = (name, value, note = "") => `<div><dt>${name}</dt><dd>${value} <small>${note}</small></dd></div>`;
  put($("placement"), p ? tile("rearrangements", `${number(p.commits)}`, `of ${number(p.proposals)} proposed`) +
    tile("experts moved", number(p.received_experts), `${short(p.received_bytes / 1e6)} MB`) +
    tile("serving time taken", ms(p.stall_us / 1e3)) +
    tile("predicted gain", number(p.predicted_gain_us, 1), "µs per step, last commit") +
    tile("realized gain", number(p.realized_gain_us, 1), "µs per step, last one priced") +
    tile("balance", number(p.balance, 3), "mean over busiest rank") +
    tile("served locally", number(100 * p.local_share, 1) + " %") :
    `<div><dt>rearrangements</dt><dd>none <small>${view.levels.placement ? "proposed yet" : "level placement is off"}` +
    "</small></dd></div>");
}
function worst(rows, what) {
  const peaks = rows.map((row, layer) => [Math.max(...row), layer]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  return peaks.map(([percent, layer]) => `layer ${layer}: ${number(percent)} % on ${what} ${rows[layer].indexOf(percent)}`).join("; ");
}
function drawExperts(load) {
  const maps = [["Load per layer and rank, now", load.ranks, "rank", 200]];
  if (load.before) maps.push(["The same load under the map before the last rearrangement", load.before, "rank", 200]);
  maps.push(["Load per layer and expert", load.experts, "expert", 500]);
  const heats = $("heats");
  heats.hidden = false;
  put(heats, maps.map(([title, rows, what], i) => `<figure><figcaption><b>${title}</b> <span class="soft">` +
    `${rows.length} layers (down) of ${rows[0].length} ${what}s (across)</span></figcaption><canvas id="heat-${i}" ` +
    `role="img"></canvas><p class="soft" id="heat-say-${i}"></p></figure>`).join("") + `<div id="last"></div>`);
  maps.forEach(([title, rows, what, most], i) => {
    heatMap($(`heat-${i}`), rows, most);
    const say = `Of the layer's mean, busiest ${what}s: ${worst(rows, what)}. Blue is below the mean, orange above; ` +
      `full orange at ${most} %.`;
    $(`heat-${i}`).setAttribute("aria-label", `${title}. ${say}`);
    $(`heat-say-${i}`).textContent = say;
  });
  const last = load.last, row = (name, a, b) => `<tr><th scope=row>${name}</th><td>${a}</td><td>${b}</td></tr>`;
  put($("last"), last ? `<h3>Last proposal: ${last.committed ? "put in force" : "refused"}</h3><p>${safe(last.reason)}</p>` +
    "<div class=wide><table><tr><th></th><th scope=col>before</th><th scope=col>after</th></tr>" +
    row("balance", number(last.balance_before, 3), number(last.balance_after, 3)) +
    (load.before ? row("balance on today's load", number(load.balance_before, 3), number(load.balance, 3)) : "") +
    row("served locally", number(100 * last.local_share_before, 1) + " %", number(100 * last.local_share_after, 1) + " %") +
    "<tr><th></th><th scope=col>predicted</th><th scope=col>realized</th></tr>" +
    row("gain, µs per step", number(last.predicted_gain_us_per_step, 1), number(last.realized_gain_us_per_step, 1)) +
    row("stall", ms(last.predicted_stall_us / 1e3), last.stall_us == null ? "–" : ms(last.stall_us / 1e3)) +
    row("experts that travelled", "", number(last.received_experts)) + "</table></div>" : "<p class=soft>No proposal yet.</p>");
}
async function askWorkers() {
  clearTimeout(askTimer);
  if ($("ask").getAttribute("aria-pressed") !== "true") return;
  if (!document.hidden) {
    try {
      const reply = await fetch(root + "/gimbal/experts", {cache: "no-store"});
      const load = await reply.json();
      if (!reply.ok) throw new Error(load.error);
      measured(() => drawExperts(load));
      const part = load.answered ? `, as ranks ${load.answered.join(", ")} send it` : "";
      $("asked").textContent = `of ${number(load.steps)} steps, at ${clock(Date.now() / 1e3)}${part}`;
    } catch (error) {
      $("asked").textContent = `no answer: ${error.message}`;
    }
  }
  askTimer = setTimeout(askWorkers, ASK_MS);
}
function makeExperts() {
  $("ask").addEventListener("click", () => {
    const on = $("ask").getAttribute("aria-pressed") !== "true";
    $("ask").setAttribute("aria-pressed", on);
    if (!on) $("heats").hidden = true;
    askWorkers();
  });
}
