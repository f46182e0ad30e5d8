// The tracker. Embed it with
//
//   <script async src="https://events.example.com/tracking.js" data-site="shop"></script>
//
// It records what visitors do on a page and sends it to /collect beside itself. docs/tracking.md has every event, every
// data- attribute and the functions of window.appliance.
//
// The queue is localStorage, one key for each event, written before anything is sent and removed when the server has
// said that it stores the event or refuses it for good. So a crash, a closed lid, a lost network or a server that is
// away lose nothing; all tabs share one queue without a race; and the keys, which are UUIDv7, tell age and order. What
// can be lost: what has waited for 7 days or finds the queue full, and, where storage is blocked, what a page that is
// gone could not hand to the browser. An event that is sent twice has one id and is stored once.
//
// Pages may have replaced what they like: nothing here calls fetch or a method of arrays, and whatever goes wrong in
// here stays in here.
(function () {
  const SESSION_MS = 1800000; // of silence end a session
  const FLUSH_AFTER_MS = 2000;
  const TIMEOUT_MS = 30000; // of one request
  const RETRY_TO_MS = 300000;
  const LONGEST_PAUSE_MS = 7200000; // whatever the server asks for, or a clock that was set back makes of it
  const MAX_BATCH_CHARS = 21000; // of up to 3 bytes: browsers let 64 KB be under way when a page is left
  const MAX_EVENT_CHARS = 65000; // about what the server takes if it is not configured otherwise
  const MAX_QUEUE_CHARS = 1000000;
  const MAX_QUEUE_MS = 604800000;
  const MAX_ERRORS = 10; // of one page
  const MAX_TEXT = 100; // letters of what was pressed, and a third of an error's
  const IDLE_MS = 15000; // so long after a sign of life a visitor still counts as engaged
  const RAGE_CLICKS = 3; // as the browser counts them: fast, and in one place
  const SCROLL_MARKS = [25, 50, 75, 90, 100];

  const SECRET = /token|passw|pwd|secret|mail|api_?key|session|phone|^(auth|code|jwt|key|otp|pin|sig)$/i;
  const DOWNLOAD = /\.(csv|dmg|docx?|exe|mp[34]|pdf|xlsx?|zip)$/i;
  const LOCAL = /^$|^127[.\d]+$|^\[::1|(^|\.)localhost$/;
  const PRESSED = "a,area,button,summary,[role=button],[type=submit],[data-track]:not(form)";

  const script = document.currentScript || {};
  const options = script.dataset || {};
  const { site } = options;
  const endpoint = options.endpoint || new URL("collect", script.src || location).href;
  // Who has just put the tag into a page must not wonder why nothing comes: this is said without data-debug.
  const misplaced = site
    ? LOCAL.test(location.hostname) && options.localhost !== "on" && 'localhost, without data-localhost="on"'
    : "no data-site";

  const VISITOR = "appliance.visitor";
  const SESSION = "appliance.session";
  const CONSENT = "appliance.consent";
  const OPTOUT = "appliance.optout";
  const QUEUE = "appliance.queue/" + site + "/";
  const PAUSE = "appliance.pause/" + site; // until when

  const say = (what, why = "") => {
    if (misplaced || "debug" in options) console.info("appliance: " + what, why);
  };

  // Whatever goes wrong in here, or in what a page hands in, must not go wrong in the page.
  const guarded = (work) => (first, second) => {
    try {
      work(first, second);
    } catch (error) {
      say("not tracked", error);
    }
  };

  // ---- what the browser remembers -------------------------------------------------------------------------------

  // Storage can be switched off, forbidden in a frame, unwanted, or full: then the memory of this page has to do.
  let store = {};
  guarded(() => (store = localStorage || store))();
  if (options.storage === "none") store = { [OPTOUT]: store[OPTOUT] };

  const write = (key, value) => {
    try {
      store[key] = value;
    } catch (error) {
      store = { ...store, [key]: value };
    }
  };

  // What concerns the visitor may be a cookie, for all hosts of a domain.
  const remember = (key, value = "") => {
    if (options.storage === "cookie") {
      const age = "; max-age=" + (value ? 34560000 : 0);
      document.cookie = key + "=" + value + age + "; path=/; samesite=lax; domain=" + (options.domain || "");
    } else write(key, value);
  };

  const recall = (key) => {
    if (options.storage === "cookie") return (("; " + document.cookie).split("; " + key + "=")[1] || "").split(";")[0];
    return store[key];
  };

  // UUIDv7: 48 bits of milliseconds, so that the server's index stays local, and a page's events in their order.
  let lastTime = 0;

  const uuid = (time = (lastTime = Math.max(Date.now(), lastTime + 1))) => {
    const start = "0" + time.toString(16);
    const random = () => ((Math.random() * 16) | 0).toString(16);
    return start.slice(0, 8) + "-" + start.slice(8) + "-7xxx-8xxx-xxxxxxxxxxxx".replace(/x/g, random);
  };

  const visitorId = () => {
    if (options.storage === "none") return;
    const id = recall(VISITOR) || uuid();
    remember(VISITOR, id);
    return id;
  };

  // All tabs share one session; each event keeps it alive.
  const sessionId = () => {
    const last = (recall(SESSION) || "").split("_");
    const id = Math.abs(Date.now() - last[1]) < SESSION_MS ? last[0] : uuid();
    remember(SESSION, id + "_" + Date.now());
    return id;
  };

  // ---- who is not tracked, and what is not told -------------------------------------------------------------------

  const refusal = () => {
    if (misplaced) return misplaced;
    if (recall(OPTOUT) || store[OPTOUT]) return "opted out";
    if (options.dnt !== "off" && (navigator.doNotTrack === "1" || navigator.globalPrivacyControl)) return "DNT or GPC";
    const consent = recall(CONSENT);
    if (consent ? consent === "0" : options.consent === "required") return "no consent";
  };

  // A list of paths, with * for anything.
  const escaped = (options.exclude || "").trim().replace(/[^\w\s,*]/g, "\\$&");
  const excluded = new RegExp("^(" + escaped.replace(/\*/g, ".*").replace(/[\s,]+/g, "|") + ")$");

  // An address without parameters that tell a secret, be they before or after its #.
  const address = (text) => {
    const url = new URL(text, document.baseURI);
    for (const part in { search: 0, hash: 0 }) {
      const values = new URLSearchParams(url[part].slice(1));
      for (const name of new Set(values.keys())) {
        if (SECRET.test(name)) {
          values.delete(name);
          url[part] = values;
        }
      }
    }
    return url;
  };

  // What JSON can hold of an object that a page has made: whatever else is in it costs only itself.
  const plain = (values) => {
    const copy = {};
    for (const name in values) {
      guarded(() => {
        const text = JSON.stringify(values[name]);
        if (text) copy[name] = JSON.parse(text);
      })();
    }
    return copy;
  };

  // ---- events -----------------------------------------------------------------------------------------------------

  let queuedChars = 0;

  const where = () => ({ url: location.href, path: location.pathname, title: document.title });

  const record = (eventType, properties) => {
    const eventId = uuid();
    let event = {
      ...where(),
      ...plain(properties),
      eventType: String(eventType),
      timestamp: new Date().toISOString(),
    };
    const reason = refusal() || (excluded.test(event.path) && "excluded");
    if (reason) return say("held back: " + eventType, reason);
    event.url = address(event.url).href;
    event.visitorId = visitorId();
    event.sessionId = sessionId();
    if (api.beforeSend) event = api.beforeSend(event);
    if (!event) return say("held back: " + eventType, "beforeSend");
    // These are not the page's to say: the site stands in the envelope, and an id is one event's.
    const text = JSON.stringify({ ...event, siteId: undefined, sentAt: undefined, eventId });
    if (text.length > MAX_EVENT_CHARS || queuedChars > MAX_QUEUE_CHARS) return say("dropped: " + eventType, "no room");
    write(QUEUE + eventId, text);
    queuedChars += text.length;
    if (queuedChars > MAX_BATCH_CHARS && !pauseLeft()) flush();
    else schedule(FLUSH_AFTER_MS);
  };

  // ---- delivery ---------------------------------------------------------------------------------------------------

  let timer;
  let sending = false;
  let failures = 0;
  let batchLimit = Infinity; // events; less while the server finds batches too large

  const schedule = (delay) => {
    timer ||= setTimeout(flush, delay);
  };

  // The keys of what waits. What has waited for too long goes, so that a server may be away for ever.
  const queued = () => {
    const keys = [];
    const oldest = QUEUE + uuid(Date.now() - MAX_QUEUE_MS);
    queuedChars = 0;
    for (const key in store) {
      if (!key.startsWith(QUEUE)) continue;
      if (key < oldest) delete store[key];
      else {
        keys[keys.length] = key;
        queuedChars += store[key].length;
      }
    }
    return keys;
  };

  // As many events as one request may hold; at least one.
  const batch = (keys, from) => {
    let events = "";
    let to = from;
    for (; to < keys.length && to - from < batchLimit; to++) {
      const event = store[keys[to]];
      if (events && events.length + event.length > MAX_BATCH_CHARS) break;
      events += (events && ",") + event;
    }
    const envelope = '{"eventType":"batch","siteId":"' + site + '","sentAt":"' + new Date().toISOString() + '","events":[';
    return { to, body: events && envelope + events + "]}" };
  };

  // All tabs and the next page wait for as long as the last failure of one of them says.
  const pauseLeft = () => {
    const left = store[PAUSE] - Date.now();
    return left > 0 && left <= LONGEST_PAUSE_MS ? left : 0;
  };

  // Send batches until none is left, or the server cannot take one.
  const deliver = async () => {
    for (;;) {
      const keys = queued();
      const { to, body } = batch(keys, 0);
      if (!body) return delete store[PAUSE]; // nothing waits for it
      // A text needs no preflight; and pages replace fetch more often than this, which has a time-out besides.
      const request = new XMLHttpRequest();
      request.open("POST", endpoint);
      request.timeout = TIMEOUT_MS;
      request.send(body);
      await new Promise((done) => (request.onloadend = done));
      const { status } = request;
      if (!status || status === 408 || status === 429 || status >= 500) return pause(request);
      delete store[PAUSE];
      failures = 0;
      if ((status === 400 || status === 413) && to > 1) {
        batchLimit = to >> 1; // one that spoils its batch is found by halving, and costs only itself
        continue;
      }
      batchLimit *= 2;
      for (let i = 0; i < to; i++) delete store[keys[i]];
      say((status < 300 ? "sent " : "refused ") + to, request.responseText);
    }
  };

  const pause = (request) => {
    const asked = request.getResponseHeader("Retry-After");
    // Not everybody at once when the server is back.
    const delay = Math.max(asked * 1000 || 0, Math.min(1000 * 2 ** ++failures, RETRY_TO_MS)) * (1 + Math.random() / 2);
    write(PAUSE, Date.now() + Math.min(delay, LONGEST_PAUSE_MS));
    say("kept", request.status || "network or CORS");
  };

  // One tab at a time: by a lock or, where pages come without TLS and have none, by making the others pause.
  const flush = async () => {
    clearTimeout(timer);
    timer = 0;
    if (!sending && !pauseLeft()) {
      sending = true;
      try {
        if (navigator.locks) {
          const locked = navigator.locks.request(QUEUE, { ifAvailable: true }, (lock) => lock && deliver());
          await locked.catch(deliver); // a frame that may not lock shares its queue with nobody
        } else {
          write(PAUSE, Date.now() + FLUSH_AFTER_MS);
          await deliver();
        }
      } catch (error) {
        say("not sent", error);
      }
      sending = false;
    }
    if (queued().length) schedule(pauseLeft() || FLUSH_AFTER_MS);
  };

  // The page may be gone in a moment. A browser says that it has taken even what it will not be able to deliver, so
  // that stays in the queue until an answer has been seen, and is sent again by the next page.
  const leave = () => {
    if (pauseLeft() && !sending) return;
    const keys = queued();
    let next = batch(keys, 0);
    while (next.body && navigator.sendBeacon(endpoint, next.body)) next = batch(keys, next.to);
    say("handed over " + next.to);
  };

  // ---- pages ------------------------------------------------------------------------------------------------------

  // Each of these is turned off by data-<its name>="off".
  const auto = (eventType, properties) => {
    if (options.auto !== "off" && options[eventType] !== "off") record(eventType, properties);
  };

  let page; // where
  let shownAt; // where the page is in view: since when
  let activeAt; // the last sign of life
  let engagedMs; // since it was shown
  let scrollDepth;
  let marks;

  // A pageview begins; `tell` records it.
  const view = (tell, properties) => {
    hide();
    page = where();
    scrollDepth = marks = 0;
    if (!document.hidden) show();
    tell("pageview", {
      referrer: document.referrer && address(document.referrer),
      query: Object.fromEntries(address(location).searchParams),
      language: navigator.language,
      // (Where there is no Temporal yet, the first question of its kind takes ten milliseconds.)
      timeZone: window.Temporal?.Now.timeZoneId() || Intl.DateTimeFormat().resolvedOptions().timeZone,
      screen: { width: screen.width, height: screen.height },
      viewport: { width: innerWidth, height: innerHeight },
      ...properties,
    });
  };

  // What was before has been left already, or was not to be tracked.
  const viewAgain = () => {
    shownAt = 0;
    view(auto);
  };

  const show = () => {
    shownAt = activeAt = Date.now();
    engagedMs = 0;
  };

  const active = () => {
    const now = Date.now();
    engagedMs += Math.min(now - activeAt, IDLE_MS);
    activeAt = now;
  };

  // On phones a hidden page is often the last that is heard of it, so it has been left until it is shown again.
  const hide = () => {
    if (!shownAt) return;
    active();
    measureScroll();
    auto("pageleave", { ...page, visibleMs: activeAt - shownAt, engagedMs, scrollDepth });
    shownAt = 0;
  };

  // In percent of the page: 100 is its end.
  const measureScroll = () => {
    const depth = Math.round((100 * (scrollY + innerHeight)) / document.documentElement.scrollHeight);
    scrollDepth = Math.max(scrollDepth, Math.min(depth, 100));
  };

  // Browsers tell it once in a frame, before they lay it out again.
  const scroll = () => {
    active();
    measureScroll();
    while (scrollDepth >= SCROLL_MARKS[marks]) auto("scroll", { depth: SCROLL_MARKS[marks++] });
  };

  // Pages that change their address without loading (single-page applications) are new pageviews.
  const watchAddress = () => {
    const current = () => address(location).href.replace(options.hash === "on" ? "" : /#.*/, "");
    let last = current();
    const look = guarded(() => {
      if (current() === last) return;
      last = current();
      view(auto);
    });
    for (const name in { pushState: 0, replaceState: 0 }) {
      const original = history[name];
      history[name] = (...values) => {
        setTimeout(look); // when the title, too, is the new one
        return original.apply(history, values);
      };
    }
    addEventListener("popstate", look);
  };

  // ---- what people do ---------------------------------------------------------------------------------------------

  const pressed = (node) => node.closest?.(PRESSED);
  const attribute = (element, name) => element.getAttribute(name) || undefined;

  // Its text is not told where somebody may have typed it.
  const describe = (element) => {
    const typed = element.isContentEditable || element.querySelector("[contenteditable],select,textarea");
    const text = typed ? "" : element.textContent.trim();
    return {
      element: element.tagName.toLowerCase(),
      elementId: attribute(element, "id"),
      text: text.replace(/\s+/g, " ").slice(0, MAX_TEXT) || undefined,
    };
  };

  // An element with data-track="signup" data-track-plan="small" makes an event signup with the plan small.
  const recordAs = (eventType, element, properties) => {
    const name = attribute(element, "data-track");
    for (const key in element.dataset) {
      if (/^track[A-Z]/.test(key)) properties[key[5].toLowerCase() + key.slice(6)] = element.dataset[key];
    }
    (name ? record : auto)(name || eventType, properties);
  };

  const click = (event) => {
    const origin = event.composedPath()[0];
    if (event.detail === RAGE_CLICKS) auto("rageclick", describe(origin));
    const target = pressed(origin) || pressed(event.target);
    if (!target || event.button > 1) return;
    const properties = describe(target);
    const link = target.closest("a,area");
    const href = link && attribute(link, "href"); // of an SVG's link, the property would be an object
    if (href) {
      const url = address(href);
      properties.href = url;
      properties.outbound = /^http/.test(url) && url.host !== location.host;
      properties.download = link.hasAttribute("download") || DOWNLOAD.test(url.pathname);
    }
    recordAs("click", target, properties);
  };

  // Which form, and which of its fields were filled; never with what. Its attributes, as a field that is named "id"
  // takes the place of form.id.
  const submit = ({ target }) => {
    const fields = [];
    for (const { type, name, id, value, checked } of target.elements) {
      if (/button|hidden|image|output|reset|submit/.test(type)) continue;
      if (/checkbox|radio/.test(type) ? checked : value) fields[fields.length] = name || id;
    }
    recordAs("submit", target, { formId: attribute(target, "id"), formName: attribute(target, "name"), fields });
  };

  let errors = 0;

  const fail = (message, file, line) => {
    if (errors++ < MAX_ERRORS) auto("error", { message: String(message).slice(0, 3 * MAX_TEXT), file: file && address(file), line });
  };

  // How the page that was loaded felt. Returns what tells it, once.
  const watchVitals = () => {
    const { responseStart } = performance.getEntriesByType("navigation")[0] || {};
    let vitals = { ...where(), ttfb: responseStart, cls: 0 };
    let begun, last, shifts;
    const notes = {
      "largest-contentful-paint": ({ startTime }) => (vitals.lcp = startTime),
      // Shifts count together while less than a second apart, for five seconds at most.
      "layout-shift": ({ startTime, value, hadRecentInput }) => {
        if (hadRecentInput) return;
        if (!(startTime - last < 1000 && startTime - begun < 5000)) shifts = 0 * (begun = startTime);
        last = startTime;
        vitals.cls = Math.max(vitals.cls, (shifts += value));
      },
      event: ({ interactionId, duration }) => {
        if (interactionId) vitals.inp = Math.max(vitals.inp || 0, duration);
      },
    };
    const observe = guarded((type) => {
      new PerformanceObserver((list) => {
        for (const entry of list.getEntries()) if (vitals) notes[type](entry);
      }).observe({ type, buffered: true, durationThreshold: 16 });
    });
    for (const type in notes) observe(type);
    return () => {
      if (vitals) auto("vitals", vitals);
      vitals = 0;
    };
  };

  const watch = () => {
    const listen = (name, react) => addEventListener(name, guarded(react), { capture: true, passive: true });
    const tellVitals = watchVitals();
    const away = () => {
      hide();
      tellVitals();
      leave();
    };
    listen("click", click);
    listen("auxclick", click);
    listen("submit", submit);
    listen("scroll", scroll);
    listen("pointermove", active);
    listen("keydown", active);
    listen("copy", () => auto("copy", { length: String(getSelection()).length }));
    listen("error", ({ message, filename, lineno }) => message && fail(message, filename, lineno));
    listen("unhandledrejection", ({ reason }) => fail((reason && reason.message) || reason));
    // Back from the browser's cache: looked at again, without being loaded again.
    listen("pageshow", ({ persisted }) => persisted && viewAgain());
    listen("pagehide", away);
    listen("visibilitychange", () => {
      if (document.hidden) return away();
      show();
      flush();
    });
    listen("online", () => {
      delete store[PAUSE];
      flush();
    });
    watchAddress();
  };

  // ---- window.appliance -------------------------------------------------------------------------------------------

  let tracking, watching;

  const begin = () => {
    const reason = refusal();
    if (reason) return say("not tracking", reason);
    if (!watching) watch();
    watching = true;
    schedule(FLUSH_AFTER_MS);
    if (!tracking) viewAgain();
    tracking = true;
  };

  // Everything but an opt-out.
  const forget = () => {
    tracking = false;
    remember(VISITOR);
    remember(SESSION);
    remember(CONSENT);
    for (const key in { ...store }) if (key !== OPTOUT && key.startsWith("appliance.")) delete store[key];
  };

  const api = {
    track: guarded(record),
    page: guarded((properties) => view(record, properties)),
    identify: guarded((userId, traits) => record("identify", { userId, traits })),
    optOut: guarded(() => {
      forget();
      remember(OPTOUT, "1");
    }),
    optIn: guarded(() => {
      remember(OPTOUT);
      begin();
    }),
    consent: guarded((given) => {
      if (given === true) remember(CONSENT, "1");
      else {
        forget();
        if (options.consent !== "required") remember(CONSENT, "0");
      }
      begin();
    }),
  };

  // Calls that were made before are kept by the stub of docs/tracking.md. They come first: one may be a refusal.
  const install = guarded(() => {
    const stub = window.appliance || {};
    if (stub.track && !stub.q) return say("not tracking", "loaded twice");
    api.beforeSend = stub.beforeSend;
    window.appliance = api;
    guarded(() => {
      for (const call of stub.q || []) api[call[0]](...call[1]);
    })();
    begin();
  });

  // A page that is prerendered has not been seen by anybody yet.
  if (document.prerendering) document.addEventListener("prerenderingchange", install);
  else install();
})();
