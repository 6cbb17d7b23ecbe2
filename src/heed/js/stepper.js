// mount(el, data): the list in el becomes a walk. data.names = the steps, for the strip of buttons.
// Space or the right arrow goes on, the left arrow back, wherever the focus is in the figure.

function mount(el, data) {
  if (!el || el.dataset.ready) return;
  el.dataset.ready = "1";
  var items = [].slice.call(el.querySelectorAll("ol > li")), now = 0, timer = null;
  el.tabIndex = 0;
  el.setAttribute("role", "group");
  el.setAttribute("aria-label", el.querySelector("figcaption").textContent + ". Space goes on.");

  function make(tag, parent, text) {
    var e = document.createElement(tag);
    if (text) e.textContent = text;
    if (parent) parent.append(e);
    return e;
  }

  var strip = document.createElement("div"), list = el.querySelector("ol");
  strip.style.cssText = "display:flex;flex-wrap:wrap;gap:.4rem;margin-bottom:.7rem";
  list.before(strip);
  list.setAttribute("aria-live", "polite");
  list.style.cssText = "list-style:none;padding:0;margin:0;min-height:4.5em";
  var tabs = data.names.map(function (name, n) {
    var b = make("button", strip, n + 1 + " " + name);
    b.type = "button";
    b.addEventListener("click", function () { stop(); go(n); });
    return b;
  });
  var row = make("div", el);
  row.style.cssText = "display:flex;flex-wrap:wrap;gap:.6rem;align-items:center;margin-top:.6rem";
  var back = button("Back", function () { stop(); go(now - 1); });
  var on = button("Next", function () { stop(); go(now + 1); });
  var play = button("Play", function () {
    if (timer) return stop();
    if (now === items.length - 1) go(0);
    play.textContent = "Pause";
    timer = setInterval(function () {
      go(now + 1);
      if (now === items.length - 1) stop();
    }, 4000);
  });
  var count = make("span", row);

  function button(text, act) {
    var b = make("button", row, text);
    b.type = "button";
    b.addEventListener("click", act);
    return b;
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function go(n) {
    now = Math.max(0, Math.min(items.length - 1, n));
    items.forEach(function (li, i) { li.hidden = i !== now; });
    tabs.forEach(function (b, i) {
      b.style.fontWeight = i === now ? "700" : "400";
      b.style.borderWidth = i === now ? "2px" : "1px";
      if (i === now) b.setAttribute("aria-current", "step"); else b.removeAttribute("aria-current");
    });
    back.disabled = now === 0;
    on.disabled = now === items.length - 1;
    count.textContent = "step " + (now + 1) + " of " + items.length;
  }
  el.addEventListener("keydown", function (e) {
    var inButton = e.target.tagName === "BUTTON";
    if (e.key === "ArrowRight" || (e.key === " " && !inButton)) { stop(); go(now + 1); }
    else if (e.key === "ArrowLeft") { stop(); go(now - 1); }
    else return;
    e.preventDefault();
  });
  go(0);
}
