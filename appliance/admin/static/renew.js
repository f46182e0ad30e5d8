// Renews the page's main part every few seconds while somebody looks at it and does nothing in it.
(function () {
  "use strict";
  const EVERY_MS = 5000;

  function isBusy(live) {
    const selection = document.getSelection();
    return (
      document.hidden ||
      live.contains(document.activeElement) ||
      live.querySelector("details[open]") !== null ||
      (selection !== null && !selection.isCollapsed)
    );
  }

  async function renew() {
    const live = document.getElementById("live");
    if (isBusy(live)) return;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin" });
      if (answer.redirected) {
        location.reload(); // the session has ended
        return;
      }
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("live");
      if (fresh && !isBusy(live)) live.replaceWith(fresh);
    } catch (error) {
      console.info("The appliance does not answer; trying again.", error);
    }
  }

  setInterval(renew, EVERY_MS);
  document.addEventListener("visibilitychange", renew);
})();
