// The queue: how old the oldest request is against what was promised it, and waits by size.
function drawQueue(view, engines) {
  const late = e => e.queue_oldest_bound_us ? e.queue_oldest_wait_us / e.queue_oldest_bound_us : 0;
  const waiting = engines.filter(e => e.queue_oldest_wait_us > 0)
    .sort((a, b) => late(b) - late(a) || b.queue_oldest_wait_us - a.queue_oldest_wait_us);
  const most = Math.max(...waiting.map(e => Math.max(e.queue_oldest_wait_us, e.queue_oldest_bound_us)), 1);
  put($("oldest"), waiting.slice(0, 8).map(e => {
    const bound = e.queue_oldest_bound_us, whole = bound || most;
    const text = `${ms(e.queue_oldest_wait_us / 1e3)}${bound ? " of " + ms(bound / 1e3) : ", no bound"}`;
    return `<div class="gauge ${late(e) > 1 ? "late" : ""}"><b>engine ${e.engine}</b><span role="img" aria-label="` +
      `${text}"><i style="width:${Math.min(100 * e.queue_oldest_wait_us / whole, 100).toFixed(1)}%"></i></span>${text}</div>`;
  }).join("") + (waiting.length > 8 ? `<p class="soft">and ${waiting.length - 8} more engines with less</p>` : "") ||
    `<p class="soft">Nothing waits.</p>`);
  const queue = view.queue;
  put($("waits"), queue.waits.length ? "<tr><th scope=col>uncached tokens</th><th scope=col>requests</th>" +
    "<th scope=col>median</th><th scope=col>P90</th></tr>" + queue.waits.map(([size, count, half, most]) =>
    `<tr><th scope=row>${safe(size)}</th><td>${number(count)}</td><td>${ms(half)}</td><td>${ms(most)}</td></tr>`)
    .join("") : "<tr><td>Level queue is off, or statistics are.</td></tr>");
  put($("queue-notes"), `Since the start: ${number(queue.overtakes)} overtakes, ${number(queue.promotions)} ` +
    `promoted for waiting too long, ${number(queue.kv_passes)} passed a head without KV blocks, ` +
    `${number(queue.yields)} steps shared with newcomers, ${number(queue.graph_steps)} cut to a CUDA graph.`);
}
