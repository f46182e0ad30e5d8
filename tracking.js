// The tracker. Embed it with
//
//   <script async src="https://events.example.com/tracking.js" data-site="shop"></script>
//
// It records pageviews, clicks, form submissions, how far a page was scrolled and how long it was looked at, and sends
// them in batches to /collect beside itself. A page can add events of its own:
//
//   window.appliance.track("signup", { plan: "small" });
//
// Events are kept until the server has said that it has them: what could not be sent is kept in the browser and sent
// with the next page. Each event has an id, so one that is sent twice is stored once.
//
// Options on the script tag: data-site (required), data-endpoint (default: /collect where the script comes from),
// data-auto="off" (only what the page tracks by itself). A visitor who has set localStorage "appliance.optout" to "1"
// is not tracked.
(function () {
  "use strict";

  const SESSION_MINUTES = 30; // of silence end a session
  const FLUSH_AFTER_MS = 2000;
  const MAX_BATCH_EVENTS = 50;
  const MAX_BATCH_BYTES = 48 * 1024; // browsers limit what may be under way when a page is left to 64 KB
  const MAX_KEPT_EVENTS = 500;
  const RETRY_FROM_MS = 2000;
  const RETRY_TO_MS = 60000;
  const TEXT_CHARS = 200; // of a link's or button's text

  // Storage can be full, switched off, or forbidden in a frame: then the memory of this page has to do.
  const memory = {};

  const script = document.currentScript;
  const site = script && script.getAttribute("data-site");
  const say = (reason) => console.info("appliance: " + reason);

  if (!site) return say('not tracking: the script tag has no data-site="..."');
  if (read("optout") === "1") return say("not tracking: this visitor has opted out");
  if (window.appliance) return say("not tracking twice: the script is on this page already");

  const endpoint = script.getAttribute("data-endpoint") || new URL("collect", script.src).href;
  const automatic = script.getAttribute("data-auto") !== "off";

  // ---- what the browser remembers -------------------------------------------------------------------------------

  function read(name) {
    try {
      return localStorage.getItem("appliance." + name);
    } catch (error) {
      return memory[name] || null;
    }
  }

  function write(name, value) {
    try {
      if (value === null) localStorage.removeItem("appliance." + name);
      else localStorage.setItem("appliance." + name, value);
    } catch (error) {
      memory[name] = value;
    }
  }

  // UUIDv7: its first 48 bits are milliseconds, so that the server's index stays local.
  function uuid() {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    let time = Date.now();
    for (let i = 5; i >= 0; i--) {
      bytes[i] = time % 256;
      time = Math.floor(time / 256);
    }
    bytes[6] = (bytes[6] & 0x0f) | 0x70;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
  }

  function visitorId() {
    let id = read("visitor");
    if (!id) write("visitor", (id = uuid()));
    return id;
  }

  // All tabs share one session; each event keeps it alive.
  function sessionId() {
    const [id, lastSeen] = (read("session") || "").split(" ");
    const alive = id && Date.now() - Number(lastSeen) < SESSION_MINUTES * 60000;
    const current = alive ? id : uuid();
    write("session", current + " " + Date.now());
    return current;
  }

  // ---- the queue --------------------------------------------------------------------------------------------------

  let queue = takeKept();
  let sending = false;
  let timer = null;
  let failures = 0;

  function track(eventType, properties) {
    queue.push({
      url: location.href,
      path: location.pathname,
      title: document.title,
      ...properties,
      eventId: uuid(),
      eventType: String(eventType),
      timestamp: new Date().toISOString(),
      sessionId: sessionId(),
      visitorId: visitorId(),
    });
    if (queue.length > MAX_KEPT_EVENTS) queue.shift();
    if (queue.length >= MAX_BATCH_EVENTS) flush();
    else schedule(FLUSH_AFTER_MS);
  }

  function schedule(delay) {
    if (timer === null) timer = setTimeout(flush, delay);
  }

  function envelope(events) {
    return JSON.stringify({ eventType: "batch", siteId: site, sentAt: new Date().toISOString(), events });
  }

  // As many events from the front of the queue as one request may hold; at least one.
  function nextBatch() {
    let count = 0;
    let size = 0;
    while (count < queue.length && count < MAX_BATCH_EVENTS) {
      size += new Blob([JSON.stringify(queue[count])]).size;
      if (count > 0 && size > MAX_BATCH_BYTES) break;
      count++;
    }
    return queue.slice(0, count);
  }

  const forget = (events) => (queue = queue.filter((event) => !events.includes(event)));

  async function flush() {
    clearTimeout(timer);
    timer = null;
    if (sending || queue.length === 0) return;
    sending = true;
    const events = nextBatch();
    const outcome = await send(events);
    sending = false;
    if (outcome === "again") {
      failures++;
      return schedule(Math.min(RETRY_FROM_MS * 2 ** (failures - 1), RETRY_TO_MS));
    }
    failures = 0;
    forget(events);
    if (queue.length > 0) schedule(0);
  }

  // text/plain needs no preflight. Only an answer of 2xx says that the events are kept.
  async function send(events) {
    try {
      const answer = await fetch(endpoint, {
        method: "POST",
        body: envelope(events),
        headers: { "Content-Type": "text/plain" },
        credentials: "omit",
        keepalive: true,
      });
      if (answer.ok) return "stored";
      if (answer.status === 429 || answer.status >= 500) return "again";
      say("the server refuses these events (" + answer.status + "): " + (await answer.text()));
      return "refused";
    } catch (error) {
      // No network, or the server does not let pages of this origin send: a browser does not tell them apart.
      if (failures === 0) say("cannot send to " + endpoint + ", trying again; is " + location.origin + " allowed there?");
      return "again";
    }
  }

  // The page may be gone in a moment: hand everything to the browser, and keep what it does not take.
  function leave() {
    while (queue.length > 0) {
      const events = nextBatch();
      if (!navigator.sendBeacon || !navigator.sendBeacon(endpoint, envelope(events))) break;
      forget(events);
    }
    if (queue.length > 0) write("kept." + site, JSON.stringify(queue));
    queue = [];
  }

  function takeKept() {
    const kept = read("kept." + site);
    if (!kept) return [];
    write("kept." + site, null);
    try {
      return JSON.parse(kept);
    } catch (error) {
      say("kept events could not be read: " + error);
      return [];
    }
  }

  // ---- what is tracked without being asked ------------------------------------------------------------------------

  let page = null; // the pageview that is being looked at: where, for how long it has been seen, how far scrolled

  function pageview() {
    endPageview();
    page = {
      where: { url: location.href, path: location.pathname, title: document.title },
      seenMs: 0,
      since: document.hidden ? null : Date.now(),
      depth: 0,
    };
    noteScroll();
    track("pageview", {
      referrer: document.referrer,
      language: navigator.language,
      screen: { width: screen.width, height: screen.height },
      viewport: { width: innerWidth, height: innerHeight },
    });
  }

  function endPageview() {
    if (!page) return;
    pauseClock();
    track("pageleave", { ...page.where, visibleMs: page.seenMs, scrollDepth: page.depth });
    page = null;
  }

  function pauseClock() {
    if (page && page.since !== null) {
      page.seenMs += Date.now() - page.since;
      page.since = null;
    }
  }

  // In percent of the page: 100 is its end, at once where the page fits the window.
  function noteScroll() {
    if (!page) return;
    const height = document.documentElement.scrollHeight;
    const depth = height ? Math.round((100 * (scrollY + innerHeight)) / height) : 100;
    page.depth = Math.max(page.depth, Math.min(depth, 100));
  }

  function click(event) {
    const target = event.target instanceof Element && event.target.closest("a, button, [role=button], [data-track]");
    if (!target) return;
    const link = target.closest("a[href]");
    track(target.getAttribute("data-track") || "click", {
      element: target.tagName.toLowerCase(),
      elementId: target.id || undefined,
      text: (target.textContent || "").trim().slice(0, TEXT_CHARS),
      href: link ? link.href : undefined,
      download: link ? link.hasAttribute("download") : undefined,
      outbound: link ? link.host !== location.host : undefined,
    });
  }

  // Which form, never what was typed into it.
  function submit(event) {
    const form = event.target;
    track("submit", { formId: form.id || undefined, formName: form.getAttribute("name") || undefined });
  }

  // Pages that change their address without loading (single-page applications) are new pageviews.
  function watchAddress() {
    let last = location.pathname + location.search;
    const look = () => {
      const now = location.pathname + location.search;
      if (now === last) return;
      last = now;
      pageview();
    };
    for (const name of ["pushState", "replaceState"]) {
      const original = history[name];
      history[name] = function (...args) {
        const result = original.apply(this, args);
        look();
        return result;
      };
    }
    addEventListener("popstate", look);
  }

  function watchPage() {
    document.addEventListener("click", click, true);
    document.addEventListener("submit", submit, true);
    addEventListener("scroll", noteScroll, { passive: true });
    watchAddress();
    // A page that is prerendered has not been seen by anybody yet.
    if (document.prerendering) document.addEventListener("prerenderingchange", pageview, { once: true });
    else pageview();
  }

  // On phones a hidden page is often the last that is heard of it: "pagehide" may never come.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      pauseClock();
      leave();
      return;
    }
    if (page) page.since = Date.now();
    queue = takeKept().concat(queue);
    if (queue.length > 0) schedule(0);
  });
  addEventListener("pagehide", () => {
    endPageview();
    leave();
  });
  // Back from the browser's cache: looked at again, without being loaded again.
  addEventListener("pageshow", (event) => {
    if (event.persisted && automatic) pageview();
  });

  window.appliance = { track };
  if (automatic) watchPage();
  else if (queue.length > 0) schedule(0);
})();
