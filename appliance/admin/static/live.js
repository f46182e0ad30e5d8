// Shows events as they arrive. Whatever they hold is put in as text, never as markup.
(function () {
  "use strict";
  const MOST = 200;
  const list = document.getElementById("events");
  const template = document.getElementById("event");
  const said = document.getElementById("stream");
  const pause = document.getElementById("pause");
  let waiting = [];
  let paused = false;

  function item(event) {
    const made = template.content.cloneNode(true);
    for (const name of ["time", "site", "type", "path"]) made.querySelector("." + name).textContent = event[name];
    made.querySelector("p").textContent = "Event " + event.id + ", visitor " + event.visitor;
    made.querySelector("pre").textContent = event.raw;
    return made;
  }

  function show() {
    if (paused) return;
    for (const event of waiting) list.prepend(item(event));
    if (waiting.length) document.getElementById("none").hidden = true;
    waiting = [];
    while (list.children.length > MOST) list.lastElementChild.remove();
  }

  function say(text) {
    if (said.textContent !== text) said.textContent = text;
  }

  const source = new EventSource(list.dataset.source);
  source.addEventListener("open", () => say("Live: events appear as they arrive."));
  source.addEventListener("message", (message) => {
    waiting.push(JSON.parse(message.data));
    waiting = waiting.slice(-MOST);
    show();
  });
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED)
      say("No longer live: too many live views are open, or you have been logged out. Load the page again.");
    else if (!paused) say("Connecting again.");
  });

  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Go on" : "Pause";
    show();
  });
})();
