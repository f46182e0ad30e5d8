// Renews the page's main part every few seconds while somebody looks at it.
(function () {
  "use strict";
  const EVERY_MS = 3000;

  // What somebody has scrolled to stays where it is.
  function show(fresh) {
    const live = document.getElementById("live");
    const scrolled = [...live.querySelectorAll("section")].map((section) => section.scrollLeft);
    live.replaceWith(fresh);
    fresh.querySelectorAll("section").forEach((section, index) => (section.scrollLeft = scrolled[index] || 0));
  }

  async function renew() {
    if (document.hidden) return;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin" });
      if (answer.redirected) {
        location.reload(); // the session has ended
        return;
      }
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("live");
      if (fresh) show(fresh);
    } catch (error) {
      console.info("The appliance does not answer; trying again.", error);
    }
  }

  setInterval(renew, EVERY_MS);
  document.addEventListener("visibilitychange", renew);
})();
