"use strict";
// The page of one node. All it shows comes from /api/v1/events: the samples of
// the last minutes and the status, which is what /api/v1/status answers.
//
// Everything is put into the page as text. Names, digests and errors come from
// registries, peers and clients, and none of them is to be trusted.

// ---- text

const size = n => {
  if (n < 0) return "?";
  if (n < 1024) return `${n} B`;
  for (const unit of ["KiB", "MiB", "GiB", "TiB"]) {
    n /= 1024;
    if (n < 1023.95) return `${n.toFixed(1)} ${unit}`;
  }
  return `${(n / 1024).toFixed(1)} PiB`;
};

// Rates are decimal, as networks are sold.
const rate = n => {
  if (n < 1) return "–";
  for (const unit of ["B/s", "kB/s", "MB/s"]) {
    if (n < 999.5) return `${n < 9.95 && unit !== "B/s" ? n.toFixed(1) : n.toFixed(0)} ${unit}`;
    n /= 1000;
  }
  return `${n.toFixed(1)} GB/s`;
};

const span = seconds => {
  if (seconds < 1) return `${Math.max(0, seconds * 1000).toFixed(0)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
};

const coarse = seconds => seconds < 10 ? `${Math.floor(seconds)} s` : span(seconds);

// now is the node's clock, at the last sample: the browser's may differ.
let now = 0;
const since = time => (now - Date.parse(time)) / 1000;
const ago = time => {
  if (!time) return "never";
  const s = since(time);
  return s < 1 ? "now" : `${coarse(s)} ago`;
};
const until = time => coarse(Math.max(1, -since(time)));

const percent = (part, whole) => whole > 0 ? `${(100 * Math.min(1, part / whole)).toFixed(2)}%` : "0%";
const short = d => d.replace(/^sha256:([0-9a-f]{12})[0-9a-f]{52}$/, "$1");
const plural = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;
const sum = counters => Object.values(counters).reduce((a, b) => a + b, 0);

// ---- elements

const $ = id => document.getElementById(id);

// el makes an element: el("td.num", "text", child, ...).
const el = (spec, ...children) => {
  const [tag, ...classes] = spec.split(".");
  const e = document.createElement(tag);
  if (classes.length) e.className = classes.join(" ");
  e.append(...children);
  return e;
};

const svg = (tag, attributes) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  return e;
};

const say = (e, text) => { if (e.textContent !== text) e.textContent = text; };
const width = (e, w) => { if (e.style.width !== w) e.style.width = w; };

// tell shows a number of bytes, and keeps it exact for machines.
const tell = (e, n) => { e.value = n; say(e, size(n)); };

// blobName is a digest as short as people write it, or a tag.
const blobName = name => {
  const e = el(name.includes(":") ? "span.mono" : "span.mono.tag", short(name));
  e.title = name;
  return e;
};

// sync makes the children of parent the items: one for each key, in order. An
// element that stays is updated in place, so that what is open stays open.
const sync = (parent, items, keyOf, make) => {
  parent.known ??= new Map();
  const keys = items.map(keyOf), stay = new Set(keys);
  for (const [key, one] of parent.known) {
    if (stay.has(key)) continue;
    one.e.remove();
    parent.known.delete(key);
  }
  let next = parent.firstElementChild;
  items.forEach((item, i) => {
    let one = parent.known.get(keys[i]);
    if (!one) parent.known.set(keys[i], one = make(item));
    one.update(item);
    if (one.e === next) next = next.nextElementSibling;
    else parent.insertBefore(one.e, next);
  });
};

// ---- charts

const chartSeconds = 600;

const niceAbove = n => {
  const power = 10 ** Math.floor(Math.log10(n));
  return [1, 2, 5, 10].map(f => f * power).find(v => v >= n * 0.999);
};

// A series is {name, label, of(sample), down}: a counter whose rate is stacked
// upwards, or downwards from zero.
class Chart {
  constructor(section, series, what) {
    this.series = series;
    this.what = what;
    this.box = section.querySelector(".chart");
    this.svg = svg("svg", {viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img"});
    this.grid = [0, 1, 2].map(() => svg("line", {x1: 0, x2: 1000}));
    this.grid[0].setAttribute("class", "zero");
    this.areas = series.map(s => svg("path", {class: `fill-${s.name}`}));
    this.at = svg("line", {class: "at", y1: 0, y2: 100, visibility: "hidden"});
    this.svg.append(...this.areas, ...this.grid, this.at);
    this.labels = [0, 1, 2].map(() => el("span.y"));
    this.quiet = el("span.quiet", "Nothing in the last 10 minutes.");
    this.readout = el("span.readout");
    this.readout.hidden = true;
    this.box.append(this.svg, ...this.labels, this.quiet, this.readout);
    for (const minutes of [10, 5, 0]) {
      const x = el("span.x", minutes ? `${minutes} min ago` : "now");
      x.style[minutes ? "left" : "right"] = minutes === 5 ? "50%" : "0";
      if (minutes === 5) x.style.transform = "translateX(-50%)";
      this.box.append(x);
    }
    this.box.addEventListener("pointermove", e => this.point(e));
    this.box.addEventListener("pointerleave", () => this.point(null));
    this.rows = new Map(series.map(s => {
      const cells = [el("td.num"), el("td.num"), el("data")];
      section.querySelector("tbody").append(s.row = el("tr", el(`td`, el(`span.key.${s.hue ?? s.name}`, s.label)), ...cells.slice(0, 2), el("td.num", cells[2])));
      return [s, cells];
    }));
  }

  // draw shows the rates between samples, and totals: the counters of the status.
  draw(samples, totals) {
    this.points = [];
    for (let i = 1; i < samples.length; i++) {
      const seconds = (samples[i].at - samples[i - 1].at) / 1000;
      if (seconds > 0) {
        this.points.push({
          at: samples[i].at, from: samples[i - 1].at,
          rates: this.series.map(s => Math.max(0, s.of(samples[i]) - s.of(samples[i - 1])) / seconds),
        });
      }
    }
    this.quiet.hidden = this.points.some(p => p.rates.some(r => r > 0));
    this.scale();
    this.stack();
    this.legend(samples, totals);
    this.describe();
    this.point(this.pointer);
  }

  scale() {
    const heights = down => this.points.map(p => p.rates.reduce((a, r, i) => !!this.series[i].down === down ? a + r : a, 0));
    const least = 1e5; // bytes per second: what is less draws no attention
    this.peak = Math.max(0, ...heights(false));
    this.deep = Math.max(0, ...heights(true));
    this.top = niceAbove(Math.max(this.peak, least));
    const mirrored = this.series.some(s => s.down);
    this.bottom = mirrored ? niceAbove(Math.max(this.deep, this.top / 5)) : 0;
    const lines = [0, this.top, mirrored ? -this.bottom : this.top / 2];
    lines.forEach((v, i) => {
      const y = this.y(v), shown = i === 0 || this.quiet.hidden;
      this.grid[i].setAttribute("y1", y);
      this.grid[i].setAttribute("y2", y);
      this.grid[i].setAttribute("visibility", shown ? "visible" : "hidden");
      const label = this.labels[i];
      say(label, shown && v ? rate(Math.abs(v)) : "");
      label.style.top = `calc((100% - 16px) * ${y / 100}${v < 0 ? " - 15px" : " + 1px"})`;
    });
  }

  y(v) { return 100 * (this.top - v) / (this.top + this.bottom); }
  x(at) { return 1000 * (1 - (now - at) / 1000 / chartSeconds); }

  // stack draws each interval as what it was on average: a step.
  stack() {
    const base = this.points.map(() => [0, 0]); // up, down
    this.series.forEach((s, n) => {
      const side = s.down ? 1 : 0, sign = s.down ? -1 : 1;
      let there = "", back = "";
      this.points.forEach((p, i) => {
        const low = base[i][side], high = base[i][side] += p.rates[n];
        const x1 = this.x(p.from).toFixed(1), x2 = this.x(p.at).toFixed(1);
        const y1 = this.y(sign * low).toFixed(2), y2 = this.y(sign * high).toFixed(2);
        there += `${there ? "L" : "M"}${x1} ${y2}L${x2} ${y2}`;
        back = `L${x2} ${y1}L${x1} ${y1}${back}`;
      });
      this.areas[n].setAttribute("d", there && `${there}${back}Z`);
    });
  }

  legend(samples, totals) {
    const last = this.points.at(-1)?.rates;
    this.series.forEach((s, n) => {
      const [current, recent, total] = this.rows.get(s);
      const sofar = s.of(totals);
      say(current, rate(last?.[n] ?? 0));
      say(recent, samples.length ? size(s.of(samples.at(-1)) - s.of(samples[0])) : size(0));
      tell(total, sofar);
      s.row.hidden = s.rare && sofar === 0;
    });
  }

  describe() {
    const last = this.points.at(-1)?.rates ?? [];
    const parts = this.series.map((s, n) => `${s.label} ${rate(last[n] ?? 0).replace("–", "nothing")}`);
    this.svg.setAttribute("aria-label", `${this.what} over the last ten minutes, at most ${rate(Math.max(this.peak, this.deep)).replace("–", "nothing")}. Now: ${parts.join(", ")}.`);
  }

  // point reads the chart at the pointer.
  point(event) {
    this.pointer = event;
    const box = this.box.getBoundingClientRect();
    const at = event && now - (1 - (event.clientX - box.left) / box.width) * chartSeconds * 1000;
    const p = event && this.points?.find(p => p.from <= at && at < p.at);
    this.readout.hidden = !p;
    this.at.setAttribute("visibility", p ? "visible" : "hidden");
    if (!p) return;
    this.at.setAttribute("x1", this.x((p.from + p.at) / 2));
    this.at.setAttribute("x2", this.x((p.from + p.at) / 2));
    const lines = this.series.map((s, n) => p.rates[n] >= 1 ? `${s.label} ${rate(p.rates[n])}` : "").filter(Boolean);
    say(this.readout, `${new Date(p.at).toLocaleTimeString()}   ${lines.join("   ") || "nothing"}`);
    const left = event.clientX - box.left > box.width / 2;
    this.readout.style.left = left ? "0" : "auto";
    this.readout.style.right = left ? "auto" : "0";
  }
}

const counter = (group, name) => s => s[group]?.[name] ?? 0;
const served = new Chart($("served"), [
  {name: "disk", label: "Disk", of: counter("served_bytes", "disk")},
  {name: "runtime", label: "Runtime's store", of: counter("served_bytes", "runtime"), rare: true},
  {name: "peer", label: "Peers", of: counter("served_bytes", "peer")},
  {name: "upstream", label: "Registries", of: counter("served_bytes", "upstream")},
  {name: "stale", hue: "stale-tag", label: "Stale tags", of: counter("served_bytes", "stale"), rare: true},
], "Bytes per second sent to this node's runtimes");
const network = new Chart($("network"), [
  {name: "peer", label: "In from peers", of: counter("fetched_bytes", "peer")},
  {name: "upstream", label: "In from registries", of: counter("fetched_bytes", "upstream")},
  {name: "sent", label: "Out to peers", of: s => s.uploaded_bytes, down: true},
], "Bytes per second over the network");

// ---- sections

const sourceNames = {disk: "disk", runtime: "runtime's store", peer: "peers", upstream: "registry", stale: "stale"};
const sourceHue = s => s === "stale" ? "stale-tag" : sourceNames[s] ? s : "none-yet";
const originText = o => `${o.name || o.kind} ${size(o.bytes)}`;
const originsText = list => {
  const shown = list.slice(0, 5).map(originText);
  if (list.length > 5) shown.push(`${list.length - 5} more`);
  return shown.join(", ");
};

// image shows a name with what tells images apart in front.
const image = (registry, repository, reference = "") => {
  const e = el("span.image", el("small", `${registry}/`), repository);
  if (reference) e.append(el("small", reference.includes(":") ? `@${short(reference)}` : `:${reference}`));
  return e;
};

const showHeader = s => {
  say($("node"), s.node);
  const state = $("ready");
  say(state, s.ready ? "ready" : "not ready");
  state.className = `state ${s.ready ? "good" : "bad"}`;
  const zone = s.members.find(m => m.self)?.zone;
  say($("facts"), [s.version, `up ${span(since(s.started))}`, `serving on ${s.proxy}`, zone && `zone ${zone}`].filter(Boolean).join("  ·  "));
};

const showProblems = s => {
  const problems = s.checks.filter(c => !c.ok).map(c => ({severity: "error", title: `Not ready (${c.name})`, what: c.reason}));
  if (s.cache.problem) problems.push({severity: "warning", title: "Cache", what: s.cache.problem});
  if (s.runtime.problem) problems.push({severity: "warning", title: "Runtime's store", what: s.runtime.problem});
  if (s.pins.problem) problems.push({severity: "error", title: "Pins", what: s.pins.problem});
  for (const p of s.pins.trouble) problems.push({severity: p.state === "missing" ? "error" : "warning", title: `Pinned, ${p.state}`, what: p.image, where: p.error});
  for (const f of s.doctor.findings) problems.push({severity: f.severity, title: "", what: f.what, where: f.where, fix: f.fix});
  $("problems").hidden = problems.length === 0;
  sync($("problems").firstElementChild, problems, p => JSON.stringify(p), p => {
    const e = el(`li.${p.severity}`, p.title ? el("b", `${p.title}: `) : "", p.what);
    if (p.where) e.append(" ", el("span.mono.soft", p.where));
    if (p.fix) {
      const fix = el("details", el("summary.soft", "Fix"), el("pre", p.fix));
      fix.open = p.severity === "error";
      e.append(fix);
    }
    return {e, update() {}};
  });
};

// what moved since the last tick, by key, for rates of single pulls and peers.
const pace = {
  then: 0, values: new Map(), next: new Map(),
  of(key, value) {
    this.next.set(key, value);
    const before = this.values.get(key), seconds = (performance.now() - this.then) / 1000;
    return before === undefined || seconds < 0.2 ? 0 : Math.max(0, value - before) / seconds;
  },
  tick() { this.then = performance.now(); this.values = this.next; this.next = new Map(); },
};

const maxMoving = 40;

const showMoving = s => {
  const fills = new Map(s.fills.map(f => [f.digest, f]));
  const rows = s.pulls.map(p => ({
    group: `${p.registry}/${p.repository}`, registry: p.registry, repository: p.repository, key: `${p.digest}${p.reference}${p.started}`,
    name: p.digest || p.reference, size: p.size, done: p.offset, here: fills.get(p.digest)?.present ?? 0,
    source: p.size ? p.source : "", started: p.started, origins: fills.get(p.digest)?.origins ?? [],
  }));
  const pulled = new Set(s.pulls.map(p => p.digest));
  for (const f of s.fills) {
    if (pulled.has(f.digest) || since(f.started) < 1) continue;
    rows.push({
      group: "", key: f.digest, name: f.digest, size: f.size, done: 0, here: f.present,
      source: f.origins[0]?.kind ?? "", started: f.started, origins: f.origins,
    });
  }
  say($("moving").querySelector(".count"), rows.length ? `${rows.length}` : "");
  $("moving").querySelector(".none").hidden = rows.length > 0;
  const groups = new Map();
  for (const r of rows.slice(0, maxMoving)) groups.set(r.group, [...groups.get(r.group) ?? [], r]);
  const list = [...groups].map(([name, rows]) => ({name, rows}));
  if (rows.length > maxMoving) list.push({name: " ", rows: [], more: rows.length - maxMoving});
  sync($("moving").querySelector(".rows"), list, g => g.name, g => {
    const first = g.rows[0];
    const title = g.more ? el("span.soft") : g.name ? image(first.registry, first.repository) : el("span.soft", "Fetched without a runtime waiting here");
    const e = el("div.group", title, el("div"));
    return {e, update(g) {
      if (g.more) say(title, `and ${plural(g.more, "more pull")}`);
      sync(e.lastElementChild, g.rows, r => r.key, movingRow);
    }};
  });
};

const movingRow = r => {
  const here = el("span.here"), done = el("span");
  const bar = el("div.bar", here, done), amount = el("div.num.amount"), source = el("div.key.source"), speed = el("div.num.soft.rate"), time = el("div.num.soft.since"), from = el("div.from");
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-label", r.name);
  const e = el("div.pull", blobName(r.name), bar, amount, source, speed, time, from);
  return {e, update(r) {
    const moved = Math.max(r.done, r.group ? 0 : r.here);
    width(here, percent(r.here, r.size));
    width(done, percent(r.done, r.size));
    bar.className = `bar ${sourceHue(r.source)}`;
    bar.setAttribute("aria-valuenow", r.size > 0 ? Math.floor(100 * moved / r.size) : 0);
    say(amount, r.size > 0 ? `${size(moved)} of ${size(r.size)}` : r.here ? size(r.here) : "waiting");
    source.className = `key source ${sourceHue(r.source)}`;
    say(source, sourceNames[r.source] ?? "waiting");
    say(speed, rate(pace.of(`pull ${r.key}`, moved)));
    say(time, coarse(Math.max(0, since(r.started))));
    say(from, r.origins.length ? `from ${originsText(r.origins)}` : "");
  }};
};

// shares is a bar of bytes by source.
const order = ["disk", "runtime", "peer", "upstream", "stale"];
const shares = () => {
  const parts = order.map(s => el(`span.${sourceHue(s)}`));
  const e = el("div.bar", ...parts);
  return {e, update(bytes) {
    const whole = sum(bytes);
    order.forEach((s, i) => width(parts[i], percent(bytes[s] ?? 0, whole)));
    e.style.visibility = whole ? "visible" : "hidden";
    e.title = order.filter(s => bytes[s]).map(s => `${sourceNames[s]} ${size(bytes[s])}`).join(", ");
  }};
};

const showRecent = s => {
  $("recent").querySelector(".none").hidden = s.recent_pulls.length > 0;
  sync($("recent").querySelector(".rows"), s.recent_pulls, p => `${p.registry}/${p.repository} ${p.started}`, p => {
    const name = el("span"), bar = shares(), total = el("data.num"), time = el("span.num.soft");
    const facts = el("p.soft"), rows = el("tbody");
    const table = el("table", el("thead", el("tr", ...["Part", "From", "Bytes", "Took"].map((t, i) => el(i > 1 ? "th.num" : "th", t)))), rows);
    const e = el("details", el("summary", name, bar.e, total, time), el("div.body", facts, table));
    return {e, update(p) {
      const key = `${p.reference} ${p.failed}`;
      if (name.key !== key) {
        name.key = key;
        name.replaceChildren(image(p.registry, p.repository, p.reference));
        if (p.failed) name.append(" ", el("span.bad", `${p.failed} failed`));
      }
      bar.update(p.served_bytes);
      tell(total, sum(p.served_bytes));
      say(time, ago(p.ended));
      const took = (Date.parse(p.ended) - Date.parse(p.started)) / 1000;
      say(facts, [`${new Date(p.started).toLocaleTimeString()}, ${span(took)}`, p.user_agent, p.more_parts && `${p.more_parts} more answers`].filter(Boolean).join(", "));
      sync(rows, p.parts, part => part.kind + part.reference, partRow);
    }};
  });
};

const partRow = part => {
  const from = el("td"), bytes = el("td.num"), took = el("td.num.soft");
  const e = el("tr", el("td", el("span.soft", `${part.kind} `), blobName(part.reference)), from, bytes, took);
  return {e, update(part) {
    const key = JSON.stringify([part.served_bytes, part.origins, part.error]);
    if (from.key !== key) {
      from.key = key;
      from.replaceChildren(...order.filter(s => s in part.served_bytes).map(s => el(`div.key.${sourceHue(s)}`, sourceNames[s])));
      if (part.origins) from.append(el("div.soft", originsText(part.origins)));
      if (part.error) from.append(el("div.bad", part.error));
    }
    say(bytes, part.kind === "tag" ? "" : size(sum(part.served_bytes)));
    say(took, span(part.seconds));
  }};
};

const pinsNotHeld = states => ["fetching", "stale", "missing", "foreign"].filter(state => states[state] > 0).map(state => `, ${states[state]} ${state}`).join("");

const showStorage = s => {
  const c = s.cache, limit = c.limit_bytes;
  const meter = $("cache-use");
  meter.hidden = !limit;
  width(meter.firstElementChild, percent(c.bytes, limit));
  const hosts = s.hosts, dirs = [hosts.containerd, hosts.crio].filter(Boolean).join(", ");
  const facts = [
    {term: "Holds", bytes: c.bytes, text: `${limit ? `of ${size(limit)} ` : ""}in ${plural(c.blobs, "blob")}`},
    s.pins.images > 0 && {term: "Pinned", bytes: s.pins.bytes, text: `${s.pins.limit_bytes ? `of ${size(s.pins.limit_bytes)} ` : ""}in ${plural(s.pins.images, "image")}${pinsNotHeld(s.pins.states)}`, bad: s.pins.states.missing > 0},
    s.replicas.wanted > 1 && s.members.length > 1 && {term: "Replicas", text: s.replicas.lacking ? `${s.replicas.lacking.toLocaleString("en")} blobs and tags are on fewer than ${s.replicas.wanted} nodes${s.replicas.stuck ? `, ${s.replicas.stuck.toLocaleString("en")} of them private or of an unknown image` : ""}${s.replicas.problem ? `: ${s.replicas.problem}` : ""}` : `what is here is on ${s.replicas.wanted} nodes or more`},
    {term: "Disk", text: `${c.free_bytes < 0 ? "cannot be read" : `${size(c.free_bytes)} free`}${c.min_free_bytes ? `, ${size(c.min_free_bytes)} stay free` : ""}`, bad: c.free_bytes < 0 || c.problem},
    {term: "Directory", text: c.dir},
    s.runtime.content_dir && {term: "Runtime's store", text: `${size(s.runtime.bytes)} in ${plural(s.runtime.blobs, "blob")}`},
    s.members.length > 0 && {term: "Index", text: `${s.index.blobs.toLocaleString("en")} blobs and tags on other nodes; ${s.index.held.toLocaleString("en")} told to them`},
    {term: "Host files", text: !dirs ? "not managed" : hosts.in_place ? `in place, ${dirs}` : `not in place, ${dirs}`, bad: dirs && !hosts.in_place},
    s.doctor.checked && {term: "Doctor", text: `${s.doctor.findings.length ? plural(s.doctor.findings.length, "finding") : "nothing found"}, ${ago(s.doctor.checked)}`},
  ].filter(Boolean);
  sync($("storage").querySelector("dl"), facts, f => f.term, f => {
    const bytes = el("data"), text = el("span"), e = el("div", el("dt", f.term), el("dd", bytes, text));
    e.className = "fact";
    return {e, update(f) {
      if (f.bytes !== undefined) tell(bytes, f.bytes);
      say(text, (f.bytes !== undefined ? " " : "") + f.text);
      text.className = f.bad ? "bad" : "";
    }};
  });
};

// healthNames are the states that `larder status` calls otherwise.
const healthNames = {open: "not asked"};
const healthHue = {ok: "good", failing: "bad", unreachable: "bad", open: "bad", paused: "warn"};

const showUpstreams = s => {
  $("upstreams").querySelector(".none").hidden = s.upstreams.length > 0;
  sync($("upstreams").querySelector(".rows"), s.upstreams, u => `${u.registry} ${u.endpoint}`, u => {
    const state = el("span"), more = el("div.more"), bar = el("span"), left = el("span"), error = el("div.more.bad");
    const budget = el("div.budget", el("div.bar", bar), left);
    const name = el("span", u.registry);
    const e = el("div.registry", el("div.line", name, state), more, budget, error);
    return {e, update(u) {
      state.className = `state ${healthHue[u.state] ?? "idle"}`;
      const retry = u.retry_at && Date.parse(u.retry_at) > now ? `, again in ${until(u.retry_at)}` : "";
      say(state, (healthNames[u.state] ?? u.state) + retry);
      const facts = u.endpoint === u.registry ? [] : [u.endpoint];
      if (u.last_ok_at) facts.push(`answered ${ago(u.last_ok_at)}`);
      if (u.latency_ns > 0) facts.push(span(u.latency_ns / 1e9));
      if (u.connections) facts.push(plural(u.connections, "request") + " under way");
      say(more, facts.join("  ·  "));
      const r = u.rate_limit;
      budget.hidden = !r;
      if (r) {
        width(bar, percent(r.remaining, r.limit));
        budget.classList.toggle("low", r.remaining < r.limit / 10);
        say(left, `${r.remaining.toLocaleString("en")} of ${plural(r.limit, "pull")} left${r.window_ns ? ` per ${span(r.window_ns / 1e9)}` : ""}`);
      }
      say(error, u.last_error && u.state !== "ok" ? u.last_error : "");
    }};
  });
};

const maxMembers = 64;
const interest = m => m.self ? 4 : m.banned_until || m.state === "unreachable" ? 3 : m.linked ? 2 : m.sent_bytes + m.received_bytes > 0 ? 1 : 0;

const showMembers = s => {
  const section = $("members");
  section.querySelector("table").hidden = s.members.length === 0;
  const none = section.querySelector(".none");
  none.hidden = s.members.length > 0;
  say(none, `${s.peers[0].toUpperCase()}${s.peers.slice(1)}.`);
  say($("peers"), s.members.length ? s.peers : "");
  const shown = new Set(s.members.length > maxMembers ? [...s.members].sort((a, b) => interest(b) - interest(a)).slice(0, maxMembers) : s.members);
  const most = Math.max(1, ...s.members.flatMap(m => [m.sent_bytes, m.received_bytes]));
  const rows = [];
  for (const z of s.zones) {
    const here = s.members.filter(m => (m.zone ?? "") === z.zone && shown.has(m)).sort((a, b) => interest(b) - interest(a));
    rows.push({zone: z, left: z.members - here.length});
    rows.push(...here.map(member => ({member, most})));
  }
  sync(section.querySelector("tbody"), rows, r => r.zone ? `zone ${r.zone.zone}` : `member ${r.member.name} ${r.member.address}`, r => r.zone ? zoneRow() : memberRow(r.member));
};

const zoneRow = () => {
  const text = el("td");
  text.colSpan = 4;
  return {e: el("tr.zone", text), update({zone, left}) {
    const facts = [zone.zone ? `Zone ${zone.zone}` : "No zone", plural(zone.members, "member")];
    if (zone.banned) facts.push(`${zone.banned} banned`);
    if (left > 0) facts.push(`${left.toLocaleString("en")} not shown`);
    say(text, facts.join("  ·  "));
  }};
};

const memberRow = m => {
  const state = el("span.state"), received = flow("peer"), sent = flow("sent");
  const e = el("tr", el("td", m.self ? el("b", m.name) : m.name, " ", el("span.soft.address", m.address)), el("td", state), el("td", received.e), el("td", sent.e));
  return {e, update({member: m, most}) {
    const [text, hue] = m.self ? ["this node", "idle"] : m.banned_until ? [`banned for ${until(m.banned_until)}`, "bad"] : m.linked ? ["linked", "good"] : [m.state, m.state === "unreachable" ? "bad" : "idle"];
    say(state, text);
    state.className = `state ${hue}`;
    received.e.hidden = sent.e.hidden = !!m.self;
    received.update(m.received_bytes, most, pace.of(`from ${m.name}`, m.received_bytes));
    sent.update(m.sent_bytes, most, pace.of(`to ${m.name}`, m.sent_bytes));
  }};
};

const flow = hue => {
  const bar = el("span"), bytes = el("data.num"), speed = el("span.num.soft");
  return {e: el("div.flow", el(`div.bar.${hue}`, bar), bytes, speed), update(n, most, perSecond) {
    width(bar, percent(n, most));
    tell(bytes, n);
    say(speed, perSecond >= 1 ? rate(perSecond) : "");
  }};
};

// ---- the stream

let samples = [], status = null, stream = null, heard = 0, version = null;

const render = () => {
  served.draw(samples, status);
  network.draw(samples, status);
  const total = sum(status.served_bytes), away = status.served_bytes.upstream ?? 0;
  say($("spared"), total ? `${(100 * (1 - away / total)).toFixed(0)} % of it not from a registry` : "");
  for (const show of [showHeader, showProblems, showMoving, showRecent, showStorage, showUpstreams, showMembers]) show(status);
  pace.tick();
  const main = document.querySelector("main");
  main.hidden = false;
  main.classList.remove("stale");
  main.dataset.at = new Date(now).toISOString();
};

const take = sample => {
  sample.at = now = Date.parse(sample.time);
  samples.push(sample);
  samples = samples.filter(s => now - s.at <= chartSeconds * 1000);
};

const connect = () => {
  stream?.close();
  stream = new EventSource("/api/v1/events");
  heard = Date.now();
  stream.addEventListener("opening", e => listen(e, first => {
    samples = [];
    first.samples.forEach(take);
    now ||= Date.now();
    status = first.status;
    const program = `${status.version} ${status.commit}`;
    if (version && version !== program) location.reload(); // another version's page
    version = program;
  }));
  stream.addEventListener("tick", e => listen(e, tick => {
    take(tick.sample);
    status = tick.status ?? status;
  }));
  stream.addEventListener("error", () => lost(stream.readyState === EventSource.CLOSED));
};

const listen = (event, use) => {
  heard = Date.now();
  use(JSON.parse(event.data));
  render();
  const live = $("live");
  live.className = "on";
  say(live, "live");
};

// lost waits for the browser to connect again, or does it where it gave up.
const lost = gaveUp => {
  $("live").className = "";
  say($("live"), status ? "connection lost, trying again" : "no connection to the agent, trying again");
  document.querySelector("main").classList.add("stale");
  if (gaveUp) heard = Date.now() - silence + 10_000;
};

const silence = 20_000; // several ticks: the connection is dead, whatever it says
setInterval(() => {
  if (!document.hidden && Date.now() - heard > silence) connect();
}, 1000);

// A page that nobody sees costs the agent nothing; the samples fill the gap.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    stream?.close();
  } else {
    connect();
  }
});
connect();
