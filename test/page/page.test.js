"use strict";
// Looks at the page of three nodes in headless Chromium; main.go starts them and
// this, and says where they are.
const assert = require("node:assert/strict");
const path = require("node:path");
const {after, before, test} = require("node:test");
const {chromium} = require("playwright-core");

const {BUSY, PEER, IDLE, CONTROL, SHOTS, CHROMIUM} = process.env;
const markup = "<img/src=x/onerror=pwned=1>";
const patience = 60_000; // for conditions, on a busy machine

let browser;
before(async () => { browser = await chromium.launch({executablePath: CHROMIUM, args: ["--no-sandbox"]}); });
after(() => browser.close());

const desktop = {viewport: {width: 1280, height: 900}}, phone = {viewport: {width: 390, height: 844}, isMobile: true, hasTouch: true};

// open shows a node's page, once it has something. What the browser complains
// about is in complaints.
const open = async (t, url, options = desktop) => {
  const context = await browser.newContext(options);
  t.after(() => context.close());
  const page = await context.newPage();
  page.complaints = [];
  page.on("console", m => ["error", "warning"].includes(m.type()) && page.complaints.push(m.text()));
  page.on("pageerror", e => page.complaints.push(e.stack));
  page.on("requestfailed", r => page.complaints.push(`${r.url()}: ${r.failure().errorText}`));
  await page.goto(url);
  if (options.javaScriptEnabled !== false) await page.waitForSelector("main[data-at]", {timeout: patience});
  return page;
};

const status = async url => (await fetch(`${url}/api/v1/status`)).json();
const post = async what => {
  const answer = await fetch(CONTROL + what, {method: "POST"});
  assert.equal(answer.status, 200, await answer.text());
};
const eventually = async (what, ok) => {
  const end = Date.now() + patience;
  for (let last; ; await new Promise(r => setTimeout(r, 200))) {
    try { return await ok(); } catch (e) { last = e; }
    if (Date.now() > end) throw new Error(`not ${what}: ${last.stack}`);
  }
};

// figures reads the numbers of the page, bytes as they are and as they are shown.
const figures = page => page.evaluate(() => {
  const bytes = e => ({bytes: Number(e.value), text: e.textContent});
  const legend = id => Object.fromEntries([...document.querySelectorAll(`#${id} tbody tr`)].map(r => [r.cells[0].textContent, bytes(r.querySelector("data"))]));
  return {
    at: Date.parse(document.querySelector("main").dataset.at),
    served: legend("served"), network: legend("network"),
    cache: bytes(document.querySelector("#storage data")),
    members: [...document.querySelectorAll("#members tbody tr:not(.zone)")].map(r => {
      const [received, sent] = [...r.querySelectorAll("data")].map(bytes);
      return {name: r.cells[0].firstChild.textContent, state: r.cells[1].textContent, received, sent};
    }),
    zones: [...document.querySelectorAll("#members .zone")].map(r => r.textContent),
    moving: [...document.querySelectorAll("#moving .pull .bar")].map(b => b.getAttribute("aria-label")),
    recent: [...document.querySelectorAll("#recent details")].map(d => ({image: d.querySelector(".image").textContent, bytes: Number(d.querySelector("data").value)})),
    registries: [...document.querySelectorAll(".registry .line")].map(r => [...r.children].map(c => c.textContent).join(" ")),
    ready: document.getElementById("ready").textContent,
  };
});

// size is how `larder status` writes bytes.
const size = n => {
  if (n < 1024) return `${n} B`;
  let unit;
  for (unit of ["KiB", "MiB", "GiB"]) if ((n /= 1024) < 1023.95) break;
  return `${n.toFixed(1)} ${unit}`;
};

const sum = o => Object.values(o).reduce((a, b) => a + b, 0);

// expected is the page's counters as a status has them.
const expected = s => ({
  "served Disk": s.served_bytes.disk ?? 0, "served Peers": s.served_bytes.peer ?? 0, "served Registries": s.served_bytes.upstream ?? 0,
  "network In from peers": s.fetched_bytes.peer ?? 0, "network In from registries": s.fetched_bytes.upstream ?? 0, "network Out to peers": s.uploaded_bytes,
});

for (const [name, url] of [["busy", BUSY], ["idle", IDLE]]) {
  for (const [device, options] of [["desktop", desktop], ["phone", phone]]) {
    for (const colorScheme of ["light", "dark"]) {
      test(`${name} node, ${device}, ${colorScheme}`, async t => {
        const page = await open(t, url, {...options, colorScheme});
        if (name === "busy") {
          await page.waitForSelector("#moving .pull", {timeout: patience});
          await page.waitForSelector("#recent details", {timeout: patience});
          await page.locator("#recent details").nth(1).evaluate(e => { e.open = true; });
        }
        await page.screenshot({path: path.join(SHOTS, `${name}-${device}-${colorScheme}.png`), fullPage: true});
        const [inner, outer] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
        assert.equal(outer, options.viewport.width, "the viewport was widened to fit");
        assert.ok(inner <= outer, `${inner} px wide in ${outer}`);
        const ground = await page.evaluate(() => getComputedStyle(document.body).backgroundColor.match(/\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0));
        assert.ok(colorScheme === "dark" ? ground < 200 : ground > 600, `ground ${ground}`);
        assert.deepEqual(page.complaints, []);
      });
    }
  }
}

test("under load the page says what the status says", async t => {
  const page = await open(t, BUSY);
  await eventually("three pulls at once", async () => assert.ok((await figures(page)).moving.length >= 3));
  // Counters only grow: what the page shows lies between two answers.
  const first = await status(BUSY);
  const start = (await figures(page)).at;
  await eventually("shown anew, twice", async () => assert.ok((await figures(page)).at > start + 3000));
  const shown = await figures(page);
  const then = await status(BUSY);
  const [low, high] = [expected(first), expected(then)];
  assert.ok(sum(high) > sum(low), "nothing moved");
  for (const key of Object.keys(low)) {
    const [section, label] = [key.slice(0, key.indexOf(" ")), key.slice(key.indexOf(" ") + 1)];
    const {bytes, text} = shown[section][label];
    assert.ok(low[key] <= bytes && bytes <= high[key], `${key}: ${bytes}, not from ${low[key]} to ${high[key]}`);
    assert.equal(text, size(bytes));
  }
  const bars = await page.locator("#moving .pull [role=progressbar]").evaluateAll(l => l.map(e => Number(e.getAttribute("aria-valuenow"))));
  assert.ok(bars.every(n => n >= 0 && n <= 100), bars.join());
  // Whoever is shown as receiving is being sent to.
  assert.deepEqual(shown.members.map(m => m.name).sort(), ["node-1", "node-2"]);
  const peer = shown.members.find(m => m.name === "node-2");
  const [before, later] = [first, then].map(s => s.members.find(m => m.name === "node-2"));
  assert.ok(before.received_bytes <= peer.received.bytes && peer.received.bytes <= later.received_bytes, JSON.stringify({before, peer, later}));
  assert.ok(before.sent_bytes <= peer.sent.bytes && peer.sent.bytes <= later.sent_bytes && later.sent_bytes > 0, JSON.stringify({before, peer, later}));
  assert.deepEqual(page.complaints, []);
});

test("a rate limit's budget is shown", async t => {
  const page = await open(t, BUSY);
  const budget = page.locator(".registry .budget.low");
  await budget.waitFor({timeout: patience});
  assert.equal(await budget.innerText(), "7 of 100 pulls left per 6 h");
  assert.equal(await budget.locator(".bar span").evaluate(e => e.style.width), "7%");
});

test("pins are counted, and what is wrong with one is told", async t => {
  const page = await open(t, BUSY);
  await eventually("both pins were looked at", async () => {
    assert.deepEqual((await status(BUSY)).pins.states, {fetching: 0, held: 1, missing: 1, stale: 0, foreign: 0});
    assert.match(await page.locator("#storage").textContent(), /Pinned1\.2 MiB of [0-9.]+ MiB in 2 images, 1 missing/);
    assert.match(await page.locator("#problems").textContent(), /Pinned, missing: [^ ]+\/team\/app-0:v1/);
  });
  assert.deepEqual(page.complaints, []);
});

test("the charts move and have words", async t => {
  const page = await open(t, BUSY);
  const areas = () => page.locator("#network path").evaluateAll(l => l.map(e => e.getAttribute("d")).join("|"));
  const words = () => page.locator("#network svg").getAttribute("aria-label");
  const was = await areas();
  assert.match(was, /^M[\d. ]+L/);
  await eventually("moved", async () => assert.notEqual(await areas(), was));
  assert.match(await words(), /^Bytes per second over the network over the last ten minutes, at most [\d.]+ [kMG]?B\/s\. Now: In from peers/);
  const box = await page.locator("#network .chart").boundingBox();
  await page.mouse.move(box.x + box.width - 6, box.y + 40);
  await page.waitForSelector("#network .readout:not([hidden])", {timeout: patience});
});

test("a past is there when the page is opened", async t => {
  const page = await open(t, BUSY);
  const d = await page.locator("#served path").evaluateAll(l => l.map(e => e.getAttribute("d")).join(""));
  assert.ok(d.split("L").length > 10, "few samples at the first sight");
});

test("what is open stays open, and names parts and nodes", async t => {
  const page = await open(t, BUSY);
  const pull = page.locator("#recent details", {has: page.locator(".key.peer", {hasText: "peers"})}).first();
  await pull.waitFor({state: "attached", timeout: patience});
  const id = await pull.evaluate(e => { e.open = true; e.id = "mine"; return e.id; });
  const at = (await figures(page)).at;
  await eventually("shown anew", async () => assert.ok((await figures(page)).at > at));
  assert.equal(await page.locator(`#${id}`).evaluate(e => e.open), true);
  assert.match(await page.locator(`#${id} .body`).innerText(), /node-2 [\d.]+ [KM]?i?B/);
});

test("a long tag stays in its column", async t => {
  const page = await open(t, BUSY);
  await post("/pull-long-tag");
  const pull = page.locator("#recent details", {has: page.locator(".image", {hasText: "/team/long"})}).first();
  await pull.waitFor({state: "attached", timeout: patience});
  const [table, column] = await pull.evaluate(e => { e.open = true; return [e.querySelector("table"), e].map(e => e.getBoundingClientRect().right); });
  assert.ok(table <= column, `the parts end at ${table} px, the column at ${column}`);
});

test("a registry that is left alone is said not to be asked", async t => {
  const page = await open(t, PEER);
  await post("/pull-from-nowhere");
  await eventually("told", async () => assert.match((await figures(page)).registries.join("\n"), /nowhere\.example\.test not asked/));
});

test("markup of others is text", async t => {
  for (const url of [BUSY, PEER]) {
    const page = await open(t, url);
    const text = () => page.evaluate(() => document.body.textContent);
    await eventually("told", async () => assert.ok((await text()).includes(`client/1 ${markup}`), "the client's name"));
    assert.ok((await text()).includes("Zone <i/id=pwned>"), "the zone");
    if (url === BUSY) {
      await eventually("refused", async () => assert.ok((await text()).includes(`DENIED: ${markup}`), "the registry's error"));
      await eventually("examined", async () => assert.ok((await text()).includes("<img src=x onerror=pwned=1>"), "the directory's name"));
    }
    const found = await page.evaluate(() => ({
      pwned: typeof pwned === "undefined" ? "" : String(pwned), // an element's id would do, too
      images: [...document.images].map(i => i.getAttribute("src")), scripts: document.scripts.length,
    }));
    assert.deepEqual(found, {pwned: "", images: ["icon.svg"], scripts: 1});
    await assert.rejects(page.evaluate(() => { document.body.innerHTML = "<b>x</b>"; }), /TrustedHTML/, "a script could make HTML of text");
  }
});

test("the idle node says that there is nothing", async t => {
  const page = await open(t, IDLE);
  const text = await page.evaluate(() => document.querySelector("main").innerText);
  for (const words of ["Nothing in the last 10 minutes.", "No runtime is waiting", "None since the agent started.", "None was needed yet.", "Off (peer.enabled = false).",
    "Neither hosts.containerd nor hosts.crio is set"]) {
    assert.ok(text.includes(words), words);
  }
  const [shown, s] = [await figures(page), await status(IDLE)];
  assert.equal(sum(expected(s)), 0);
  assert.deepEqual([shown.cache.bytes, shown.moving, shown.recent, shown.members, shown.ready], [0, [], [], [], "ready"]);
});

test("without a script there is a snapshot", async t => {
  const page = await open(t, BUSY, {...phone, javaScriptEnabled: false});
  const text = await page.locator("body").innerText();
  assert.match(text, /This is the node at one moment/);
  assert.match(text, /team\/app-/);
  assert.match(text, /node-2/);
  assert.ok(text.includes("<i/id=pwned>"), "the zone");
  assert.equal(await page.locator("img").count(), 1);
  const [inner, outer] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(inner <= outer, `${inner} px wide in ${outer}`);
  assert.deepEqual(page.complaints, []);
});

test("a node that is gone is told of, and found again", async t => {
  const page = await open(t, IDLE);
  await post("/stop-idle"); // which fails if the page's stream delays it
  await page.waitForSelector("main.stale", {timeout: patience});
  assert.match(await page.locator("#live").innerText(), /trying again/);
  assert.ok(await page.locator("#ready").evaluate(e => getComputedStyle(e).opacity) < 1, "the node looks ready");
  await post("/start-idle");
  await page.waitForSelector("main:not(.stale)", {timeout: patience});
  assert.equal(await page.locator("#live").innerText(), "live");
});

// reference is a tag, or a digest in short: what is fetched for a pin is asked for by digest.
const reference = ref => ref.replace(/^sha256:(.{12}).*/, "@$1").replace(/^(?!@)/, ":");

test("at rest the page and the status are equal", async t => {
  const page = await open(t, BUSY);
  await post("/stop-load");
  await eventually("at rest", async () => {
    const s = await status(BUSY);
    assert.deepEqual([s.pulls, s.fills], [[], []]);
    const shown = await figures(page);
    for (const [key, bytes] of Object.entries(expected(s))) {
      const [section, label] = [key.slice(0, key.indexOf(" ")), key.slice(key.indexOf(" ") + 1)];
      assert.deepEqual(shown[section][label], {bytes, text: size(bytes)}, key);
    }
    assert.deepEqual(shown.cache, {bytes: s.cache.bytes, text: size(s.cache.bytes)});
    assert.deepEqual(shown.moving, []);
    assert.deepEqual(shown.recent, s.recent_pulls.map(p => ({image: `${p.registry}/${p.repository}${reference(p.reference)}`, bytes: sum(p.served_bytes)})));
    assert.deepEqual(shown.registries.map(r => r.replace(/, again in .*/, "")), s.upstreams.map(u => `${u.registry} ${u.state.replace("open", "not asked")}`));
    for (const m of s.members.filter(m => !m.self)) {
      const row = shown.members.find(r => r.name === m.name);
      assert.deepEqual([row.received.bytes, row.sent.bytes], [m.received_bytes, m.sent_bytes]);
    }
    assert.deepEqual(shown.zones, s.zones.map(z => `${z.zone ? `Zone ${z.zone}` : "No zone"}  ·  ${z.members} member`));
  });
  await page.screenshot({path: path.join(SHOTS, "rest.png"), fullPage: true});
  assert.deepEqual(page.complaints, []);
});
