// The tracker. Embed it with
//
//   <script async src="https://events.example.com/tracking.js" data-site="shop"></script>
//
// It records pageviews, clicks, form submissions, how far a page was scrolled and how long it was looked at, and sends
// them in batches to /collect beside itself. A page can add events of its own:
//
//   window.appliance.track("signup", { plan: "small" });
//
// Events wait in the page until the server has said that it stores or refuses them. When the page is left, what waits
// is handed to the browser, which delivers it as a rule and tells nobody when it could not; where there is no network,
// or sending has just failed, or the browser does not take it, it is kept in localStorage instead and sent with the
// next page. So what can be lost: what the browser took and could not deliver, what a page held that crashed, all but
// the latest 500 events that wait, and what does not fit in localStorage. Each event has an id, so one that is sent
// twice is stored once. An event that JSON or one request cannot hold is dropped, and the console says so.
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
  const MAX_REQUEST_BYTES = 64 * 1024; // what the server takes if it is not configured otherwise
  const MAX_KEPT_EVENTS = 500;
  const RETRY_FROM_MS = 2000;
  const RETRY_TO_MS = 60000;
  const LONGEST_PAUSE_MS = 3600000; // whatever the server asks for
  const TEXT_CHARS = 200; // of a link's or button's text

  // Storage can be full, switched off, or forbidden in a frame: then the memory of this page has to do.
  const memory = {};

  const script = document.currentScript;
  const site = script && script.getAttribute("data-site");
  const say = (reason, ...details) => console.info("appliance: " + reason, ...details);

  if (!site) return say('not tracking: the script tag has no data-site="..."');
  if (read("optout") === "1") return say("not tracking: this visitor has opted out");
  if (window.appliance) return say("not tracking twice: the script is on this page already");

  const endpoint = script.getAttribute("data-endpoint") || new URL("collect", script.src).href;
  const automatic = script.getAttribute("data-auto") !== "off";

  // ---- what the browser remembers -------------------------------------------------------------------------------

  function read(name) {
    try {
      return localStorage.getItem("appliance." + name) ?? memory[name] ?? null;
    } catch (error) {
      return memory[name] ?? null;
    }
  }

  function write(name, value) {
    if (!store(name, value)) memory[name] = value;
  }

  function store(name, value) {
    try {
      if (value === null) localStorage.removeItem("appliance." + name);
      else localStorage.setItem("appliance." + name, value);
      return true;
    } catch (error) {
      return false;
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

  let queue = takeKept(); // each event as JSON text
  let sending = false;
  let timer = null;
  let failures = 0; // since a batch was last settled
  let pauseAskedMs = 0;

  // Whatever goes wrong in here, or in what a page hands in, must not go wrong in the page.
  function guarded(work) {
    return (...values) => {
      try {
        work(...values);
      } catch (error) {
        say("not tracked:", error);
      }
    };
  }

  const track = guarded((eventType, properties) => {
    const event = JSON.stringify({
      url: location.href,
      path: location.pathname,
      title: document.title,
      ...properties,
      toJSON: undefined, // a page's own would speak for the whole event
      eventId: uuid(),
      eventType: String(eventType),
      timestamp: new Date().toISOString(),
      sessionId: sessionId(),
      visitorId: visitorId(),
    });
    if (!fits(event)) return;
    queue = latest([...queue, event]);
    if (queue.length >= MAX_BATCH_EVENTS && failures === 0) flush();
    else schedule(FLUSH_AFTER_MS);
  });

  const latest = (events) => events.slice(-MAX_KEPT_EVENTS);

  function schedule(delay) {
    if (timer === null) timer = setTimeout(flush, delay);
  }

  function envelope(events) {
    const fields = JSON.stringify({ eventType: "batch", siteId: site, sentAt: new Date().toISOString() });
    return fields.slice(0, -1) + ',"events":[' + events.join(",") + "]}";
  }

  function bytes(text) {
    return new Blob([text]).size;
  }

  // What fits in no request would stand in the way of everything behind it.
  function fits(event) {
    const size = bytes(envelope([event]));
    if (size <= MAX_REQUEST_BYTES) return true;
    say("an event of " + size + " bytes is dropped, a request holds " + MAX_REQUEST_BYTES);
    return false;
  }

  // As many events from the front of the queue as one request may hold; at least one.
  function nextBatch() {
    let count = 0;
    let size = bytes(envelope([]));
    while (count < queue.length && count < MAX_BATCH_EVENTS) {
      size += bytes(queue[count]) + 1;
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
    let settled = false;
    try {
      settled = await deliver(nextBatch());
    } finally {
      sending = false;
    }
    failures = settled ? 0 : failures + 1;
    if (queue.length > 0) schedule(settled ? 0 : pause());
  }

  function pause() {
    const grown = Math.min(RETRY_FROM_MS * 2 ** (failures - 1), RETRY_TO_MS);
    return Math.max(grown, pauseAskedMs);
  }

  // Whether each of the events is stored or refused for good. One that spoils its batch is found by halving, so that it
  // costs only itself.
  async function deliver(events) {
    const outcome = await send(events);
    if (outcome === "again") return false;
    if (outcome === "halve") {
      failures++; // a page that is left meanwhile must not hand them to the browser in one piece
      const middle = Math.ceil(events.length / 2);
      return (await deliver(events.slice(0, middle))) && deliver(events.slice(middle));
    }
    forget(events);
    return true;
  }

  // Events that the server took the batch without.
  function sayRejected(text) {
    try {
      for (const { reason } of JSON.parse(text).rejected) say("the server refuses an event: " + reason);
    } catch (error) {
      say("an answer could not be read: " + error);
    }
  }

  // text/plain needs no preflight. Only an answer of 2xx says that the events are kept.
  async function send(events) {
    pauseAskedMs = 0;
    try {
      const body = envelope(events);
      const answer = await fetch(endpoint, {
        method: "POST",
        body,
        headers: { "Content-Type": "text/plain" },
        credentials: "omit",
        // Not when trying again: what other requests of the page leave of the limit may have been too little, and when
        // the page is left the events are kept.
        keepalive: failures === 0 && bytes(body) <= MAX_BATCH_BYTES,
      });
      if (answer.ok) {
        sayRejected(await answer.text());
        return "stored";
      }
      if (answer.status === 429 || answer.status >= 500) {
        pauseAskedMs = readPause(answer.headers.get("Retry-After"));
        return "again";
      }
      if ((answer.status === 400 || answer.status === 413) && events.length > 1) return "halve";
      say("the server refuses " + events.length + " events (" + answer.status + "): " + (await answer.text()));
      return "refused";
    } catch (error) {
      // No network, or the server does not let pages of this origin send: a browser does not tell them apart.
      if (failures === 0) say("cannot send to " + endpoint + ", trying again; is " + location.origin + " allowed there?");
      return "again";
    }
  }

  // Seconds or a date; null where a server of another origin does not expose the header.
  function readPause(retryAfter) {
    const pauseMs = /^\d+$/.test(retryAfter) ? Number(retryAfter) * 1000 : Date.parse(retryAfter) - Date.now();
    return pauseMs > 0 ? Math.min(pauseMs, LONGEST_PAUSE_MS) : 0;
  }

  // The page may be gone in a moment. A browser says that it has taken even what it will not be able to deliver, so
  // nothing is handed to it while sending is known to fail.
  function leave() {
    while (queue.length > 0 && navigator.onLine && failures === 0) {
      const events = nextBatch();
      if (!handOver(events)) break;
      forget(events);
    }
    if (queue.length > 0) keep();
  }

  function handOver(events) {
    try {
      return navigator.sendBeacon(endpoint, envelope(events));
    } catch (error) {
      return false;
    }
  }

  // Beside what other tabs have kept. What does not fit stays with this page, which may be looked at again.
  function keep() {
    const events = latest([...readKept(), ...queue]);
    if (store("kept." + site, "[" + events.join(",") + "]")) queue = [];
  }

  function takeKept() {
    const events = readKept();
    store("kept." + site, null);
    return events;
  }

  // Anyone on this origin can have written it.
  function readKept() {
    try {
      const kept = JSON.parse(read("kept." + site) || "[]");
      return kept.map((event) => JSON.stringify(event)).filter(fits);
    } catch (error) {
      say("kept events could not be read:", error);
      return [];
    }
  }

  // ---- what is tracked without being asked ------------------------------------------------------------------------

  let page = null; // the pageview that is being looked at: where, for how long it has been seen, how far scrolled

  const pageview = guarded(() => {
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
  });

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
      elementId: target.getAttribute("id") || undefined,
      text: (target.textContent || "").trim().slice(0, TEXT_CHARS),
      href: link ? link.href : undefined,
      download: link ? link.hasAttribute("download") : undefined,
      outbound: link ? link.host !== location.host : undefined,
    });
  }

  // Which form, never what was typed into it. Its attributes, as a field named "id" takes the place of form.id.
  function submit(event) {
    const form = event.target;
    track("submit", {
      formId: form.getAttribute("id") || undefined,
      formName: form.getAttribute("name") || undefined,
    });
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
    document.addEventListener("click", guarded(click), true);
    document.addEventListener("submit", guarded(submit), true);
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
    queue = latest([...takeKept(), ...queue]);
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
