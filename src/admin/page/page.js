"use strict";
// The status page. What it is told goes into the document as text: names are clients' to choose.

const $ = (id) => document.getElementById(id);

/** An element with a class and text or children. */
function el(tag, cls, ...children) {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  node.append(...children.filter((c) => c !== null && c !== undefined && c !== ""));
  return node;
}

function span(seconds) {
  const s = Math.floor(seconds);
  if (s < 120) return `${s}s`;
  if (s < 7200) return `${Math.floor(s / 60)}m`;
  return `${Math.floor(s / 3600)}h${String(Math.floor((s % 3600) / 60)).padStart(2, "0")}m`;
}

const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;

/** Gives a node these children, and leaves those alone that are there already. The focus stays where it was. */
function show(node, children) {
  const active = document.activeElement;
  const focus = active && node.contains(active) ? active.dataset.id : null;
  children.forEach((child, i) => {
    const old = node.children[i];
    if (!old) node.append(child);
    else if (!old.isEqualNode(child)) old.replaceWith(child);
  });
  while (node.children.length > children.length) node.lastElementChild.remove();
  if (focus && !node.contains(document.activeElement)) {
    [...node.querySelectorAll("[data-id]")].find((n) => n.dataset.id === focus)?.focus();
  }
}

// ---- The pool

let pool = null;
let token = "";
let received = 0;

function advice(view) {
  const all = view.advice.map((a) => el("div", `advice ${a.grade}`, el("p", "what", a.what), el("p", "todo", a.todo)));
  if (all.length > 0) return all;
  return [el("div", "advice good", el("p", "what", "All is well: every daemon takes sessions, and nobody waits."))];
}

function totals(view) {
  const t = view.totals;
  const one = (name, value) => el("div", "", el("dt", "", name), el("dd", "", value));
  return [
    one("Slots in use", `${t.used} / ${t.slots}`),
    one("Daemons that take sessions", `${t.ready} / ${t.daemons}`),
    one("Builds that wait", String(t.waiting)),
    one("Sessions", String(t.sessions)),
  ];
}

function standing(d) {
  if (d.refused) return ["bad", "refused"];
  if (d.health === "ejected") return ["bad", "ejected"];
  if (d.state !== "ready") return ["warn", d.state];
  if (d.cordon) return ["warn", d.cordon.drained ? "drained" : d.cordon.deadline !== null ? "draining" : "cordoned"];
  if (d.cordoned) return ["warn", "cordoned"];
  return ["", "ready"];
}

function does(s) {
  const parts = [];
  if (s.builds) parts.push(count(s.builds, "build"));
  if (s.containers) parts.push(s.names && s.names.length ? `runs ${s.names.join(", ")}${s.containers > s.names.length ? " …" : ""}` : count(s.containers, "container"));
  const other = s.open - s.builds;
  if (other > 0) parts.push(count(other, "open request"));
  if (s.overdue) parts.push("nobody attends it");
  return parts.join(", ") || "idle";
}

function act(d, verb, label, danger) {
  const button = el("button", danger ? "danger" : "", label);
  button.type = "button";
  button.dataset.id = `${verb} ${d.id}`;
  button.dataset.verb = verb;
  button.dataset.daemon = d.id;
  button.setAttribute("aria-label", `${label} ${d.id}`);
  return button;
}

function daemon(d, view) {
  const [cls, word] = standing(d);
  const slots = el("div", "slots");
  slots.setAttribute("role", "img");
  slots.setAttribute("aria-label", `${d.used} of ${d.slots} slots in use`);
  const shown = Math.min(d.slots, 40);
  for (let i = 0; i < shown; i++) slots.append(el("i", i < d.used ? "used" : i < d.used + d.strangers ? "other" : ""));
  const here = view.sessions.filter((s) => s.daemon === d.id);
  const busy = here.filter((s) => s.slots > 0 || s.open > 0);
  const list = el("ul", "", ...busy.slice(0, 6).map((s) => el("li", "", el("span", "key", s.key), ` ${does(s)}`)));
  if (busy.length > 6) list.append(el("li", "quiet", `and ${busy.length - 6} more`));
  const strangers = d.strangers ? `, ${d.strangers} without a session` : "";
  const node = el("li", `daemon ${cls}`,
    el("div", "name", el("b", "", d.id), el("span", "state", word)),
    slots,
    el("p", "quiet", `${d.used} of ${count(d.slots, "slot")} in use${strangers}, ${count(d.sessions, "session")}${d.version ? `, dockerd ${d.version}` : ""}`),
    d.reason ? el("p", "reason", d.reason) : null,
    d.health === "ejected" && d.back_off > 0 ? el("p", "quiet", `must be well for ${span(d.back_off)} before it takes sessions again`) : null,
    busy.length ? list : null);
  if (token && d.state === "ready") {
    node.append(el("div", "acts",
      d.cordoned ? act(d, "uncordon", "Uncordon") : act(d, "cordon", "Cordon"),
      d.cordon && (d.cordon.drained || d.cordon.deadline !== null) ? null : act(d, "drain", "Drain…", true)));
  }
  return node;
}

function cell(label, text, cls) {
  const td = el("td", cls, text);
  if (label) td.dataset.label = label;
  return td;
}

function named(key) {
  const button = el("button", "key", key);
  button.type = "button";
  button.dataset.id = `why ${key}`;
  button.dataset.why = key;
  button.title = "Why is it there?";
  return button;
}

function ticket(t) {
  const expected = t.expected === null || t.expected === undefined ? "unknown" : `about ${span(t.expected)}`;
  return el("tr", "", cell("Position", String(t.position), "n"), cell("", named(t.key)), cell("Tenant", t.tenant),
    cell("Waited", span(t.waited), "n"), cell("Expected", expected, "n"), cell("Waits for", t.awaits));
}

function session(s) {
  return el("tr", "", cell("", named(s.key)), cell("Tenant", s.tenant), cell("Daemon", s.daemon),
    cell("Slots", String(s.slots), "n"), cell("Does", does(s)), cell("Since", span(s.since), "n"));
}

const GRADES = { ejected: "bad", misfit: "bad", lost: "bad", refused: "bad", emptied: "bad", problem: "warn", gone: "warn",
  cordoned: "warn", draining: "warn", overdue: "warn", leaving: "warn", ready: "good", uncordoned: "good" };

function event(e) {
  const at = new Date(e.at);
  const time = el("time", "", at.toLocaleTimeString([], { hour12: false }));
  time.dateTime = at.toISOString();
  time.title = at.toLocaleString();
  const times = e.times > 1 ? ` (${e.times} times)` : "";
  return el("li", GRADES[e.kind] || "", time, el("span", "kind", e.kind),
    el("span", "", [e.daemon, e.session].filter(Boolean).join(" ")), el("span", "message", e.message + times));
}

function tenants(view) {
  const waiting = new Map();
  for (const t of view.queue.tickets) waiting.set(t.tenant, (waiting.get(t.tenant) || 0) + 1);
  if (waiting.size < 2) return "";
  return [...waiting].sort((a, b) => b[1] - a[1]).slice(0, 8).map(([t, n]) => `${t}: ${n}`).join(" · ");
}

/** Reads aloud what is new among what is wrong; not that somebody waits a second longer. */
let spoken = "";
function speak(view) {
  const words = view.advice.map((a) => a.what.replace(/\d+(s|m|h)?/g, "")).join(" ");
  if (words === spoken) return;
  spoken = words;
  $("spoken").textContent = view.advice.map((a) => a.what).join(" ") || "All is well.";
}

const some = (shown, all) => (shown < all ? `${shown} of ${all} shown` : all > 0 ? String(all) : "");

function render(view) {
  show($("advice"), advice(view));
  speak(view);
  show($("totals"), totals(view));
  show($("daemons"), view.daemons.map((d) => daemon(d, view)));
  show($("queue").tBodies[0], view.queue.tickets.map(ticket));
  show($("sessions").tBodies[0], view.sessions.map(session));
  show($("events"), view.events.slice().reverse().map(event));
  $("queue").hidden = view.queue.tickets.length === 0;
  $("queue-none").hidden = view.queue.tickets.length > 0;
  $("sessions").hidden = view.sessions.length === 0;
  $("sessions-none").hidden = view.sessions.length > 0;
  $("events-none").hidden = view.events.length > 0;
  $("tenants").textContent = tenants(view);
  $("daemons-count").textContent = some(view.daemons.length, view.totals.daemons);
  $("queue-count").textContent = some(view.queue.tickets.length, view.totals.waiting);
  $("sessions-count").textContent = some(view.sessions.length, view.totals.sessions);
  const lease = view.lease ? `, ${view.lease.role === "holder" ? "this proxy admits" : `admits: ${view.lease.holder || "nobody"}`}` : "";
  $("proxy").textContent = `version ${view.version}${view.api ? `, API ${view.api[0]} to ${view.api[1]}` : ""}${lease}`;
  const bad = view.advice.filter((a) => a.grade === "bad").length;
  document.title = bad ? `(${bad}) dindpool` : view.totals.waiting ? `${view.totals.waiting} wait · dindpool` : "dindpool";
}

// ---- Live

function link(cls, text) {
  const node = $("link");
  node.className = `link ${cls}`;
  if (node.textContent !== text) node.textContent = text;
}

let source = null;
function connect() {
  source = new EventSource("live");
  source.addEventListener("pool", (message) => {
    pool = JSON.parse(message.data);
    received = Date.now();
    link("live", "live");
    render(pool);
  });
  source.addEventListener("error", () => {
    link("lost", "no connection: what is shown is old");
    // An answer that is no stream (too many watch) ends the source for good.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 5000);
  });
}
setInterval(() => {
  if (received && Date.now() - received > 15000) link("lost", `no word for ${span((Date.now() - received) / 1000)}: what is shown is old`);
}, 1000);

// ---- The operator. The token goes into a header that no other site can send, and is kept nowhere else.

async function call(method, path, by = token) {
  const headers = by ? { Authorization: `Bearer ${by}` } : {};
  const answer = await fetch(path, { method, headers, credentials: "omit", redirect: "error" });
  if (answer.ok) return answer;
  let said = "";
  try { said = (await answer.json()).message; } catch { said = `${answer.status}`; }
  throw new Error(said);
}

$("operator").addEventListener("click", () => {
  if (token) {
    token = "";
    $("operator").textContent = "Operator…";
    if (pool) render(pool);
    return;
  }
  const sign = $("sign");
  sign.hidden = !sign.hidden;
  $("operator").setAttribute("aria-expanded", String(!sign.hidden));
  if (!sign.hidden) $("token").focus();
});

$("sign").addEventListener("submit", async (submit) => {
  submit.preventDefault();
  const given = $("token").value.trim();
  try {
    if (!/^[\x21-\x7e]+$/.test(given)) throw new Error("a token has visible ASCII characters only");
    await call("GET", "operator", given);
    token = given;
    $("token").value = "";
    $("sign").hidden = true;
    $("operator").setAttribute("aria-expanded", "false");
    $("operator").textContent = "Sign off";
    $("operator").focus();
    if (pool) render(pool);
  } catch (error) {
    $("signed").textContent = error.message;
  }
});

$("daemons").addEventListener("click", async (click) => {
  const { verb, daemon: id } = click.target.dataset;
  if (!verb) return;
  if (verb === "drain" && !window.confirm(`Drain ${id}?\nIt takes no new sessions; work that is left after 10 minutes is cut.`)) return;
  click.target.disabled = true;
  try {
    const answer = await call("POST", `daemons/${encodeURIComponent(id)}/${verb}`);
    // A drain is told of line by line; it goes on without this reader.
    if (answer.body) await answer.body.cancel();
    $("acted").textContent = { cordon: `${id} takes no new sessions.`, uncordon: `${id} takes sessions.`, drain: `The drain of ${id} has begun.` }[verb];
  } catch (error) {
    $("acted").textContent = error.message;
    click.target.disabled = false;
  }
});

// ---- Why

async function why(key) {
  const box = $("why");
  const row = (name, text) => (text ? [el("dt", "", name), el("dd", "", text)] : []);
  $("why-title").textContent = key;
  box.hidden = false;
  try {
    const w = await (await call("GET", `sessions/${encodeURIComponent(key)}`)).json();
    const waiting = w.waiting.map((t) => `position ${t.position}, for ${span(t.waited)}: ${t.awaits}`).join("; ");
    const compared = ((w.why && w.why.compared) || []).map((c) =>
      `${c.daemon} ${c.used}/${c.slots}${c.against ? ` +${c.against}` : ""}${c.warm ? " warm" : ""}${c.cost === null || c.cost === undefined ? "" : ` cost ${c.cost.toFixed(2)}`}`).join(" · ");
    show(box.querySelector("dl"), [
      ...row("Recognised", w.recognised),
      ...row("Daemon", w.daemon ? `${w.daemon}${w.session ? "" : " (no lease now)"}` : "none"),
      ...row("Why there", w.reason),
      ...row("Compared", compared),
      ...row("Waited", w.awaited ? `${span(w.waited)} for ${w.awaited}` : w.daemon ? "not at all" : ""),
      ...row("Waits now", waiting),
    ]);
  } catch (error) {
    show(box.querySelector("dl"), row("Why", error.message));
  }
  box.scrollIntoView({ block: "nearest" });
}
document.addEventListener("click", (click) => {
  if (click.target.dataset && click.target.dataset.why) why(click.target.dataset.why);
});
$("why-close").addEventListener("click", () => { $("why").hidden = true; });

connect();
