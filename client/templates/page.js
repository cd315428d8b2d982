"use strict";
// Asks for this very page again and puts what is new in the old one's place.
(() => {
  const everyMs = 1000 * Number(document.body.dataset.refresh);
  const stale = document.getElementById("stale");
  const openOnes = () => [...document.querySelectorAll("details[open]")].map((one) => one.id);
  async function refresh() {
    try {
      const answer = await fetch("/", { cache: "no-store", redirect: "error" });
      if (!answer.ok) throw new Error("no page");
      const found = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = openOnes();
      document.querySelector("main").replaceWith(document.adoptNode(found.querySelector("main")));
      for (const id of open) document.getElementById(id)?.setAttribute("open", "");
      stale.hidden = true;
    } catch {
      stale.hidden = false;
    }
  }
  setInterval(() => { if (!document.hidden) refresh(); }, everyMs);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
})();
