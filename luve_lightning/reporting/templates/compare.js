// Two pictures over each other with a divider that is dragged or moved by keys, and zoom.
"use strict";
document.querySelectorAll("[data-compare]").forEach((figure) => {
  const stage = figure.querySelector(".stage");
  const viewport = figure.querySelector(".viewport");
  const canvas = figure.querySelector(".canvas");
  const divider = figure.querySelector(".divider");
  const tools = figure.querySelector(".tools");
  const [left, right] = ["left", "right"].map((side) => figure.querySelector(`.tag-${side}`).textContent);
  const highest = 8;
  let share = 0.5; // of the visible width
  let zoom = 1;

  // The divider stays where it is on the screen; the cut is where it lies on the picture.
  function draw() {
    const cut = (viewport.scrollLeft + share * viewport.clientWidth) / (canvas.clientWidth || 1);
    const percent = Math.round(share * 100);
    stage.style.setProperty("--at", `${share * 100}%`);
    canvas.style.setProperty("--cut", `${cut * 100}%`);
    divider.setAttribute("aria-valuenow", String(percent));
    divider.setAttribute("aria-valuetext", `${percent} % ${left}, ${100 - percent} % ${right}`);
  }
  function moveTo(next) {
    share = Math.min(1, Math.max(0, next));
    draw();
  }
  function moveToPointer(event) {
    const box = viewport.getBoundingClientRect();
    moveTo((event.clientX - box.left) / viewport.clientWidth);
  }
  // What was in the middle of the view stays there.
  function zoomTo(next) {
    const before = zoom;
    zoom = Math.min(highest, Math.max(1, next));
    const middle = [
      (viewport.scrollLeft + viewport.clientWidth / 2) / before,
      (viewport.scrollTop + viewport.clientHeight / 2) / before,
    ];
    canvas.style.setProperty("--zoom", String(zoom));
    figure.classList.toggle("zoomed", zoom > 1);
    viewport.scrollLeft = middle[0] * zoom - viewport.clientWidth / 2;
    viewport.scrollTop = middle[1] * zoom - viewport.clientHeight / 2;
    tools.querySelector("output").textContent = `${zoom}x`;
    tools.querySelector('[data-zoom="out"]').disabled = zoom === 1;
    tools.querySelector('[data-zoom="in"]').disabled = zoom === highest;
    draw();
  }
  function drag(element, start, move) {
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !start(event)) return;
      element.setPointerCapture(event.pointerId);
      const going = (next) => move(next);
      const stop = () => {
        element.removeEventListener("pointermove", going);
        element.removeEventListener("pointerup", stop);
        element.removeEventListener("pointercancel", stop);
      };
      element.addEventListener("pointermove", going);
      element.addEventListener("pointerup", stop);
      element.addEventListener("pointercancel", stop);
    });
  }

  drag(divider, (event) => { event.preventDefault(); divider.focus({ preventScroll: true }); return true; }, moveToPointer);
  let last = null;
  drag(
    viewport,
    (event) => {
      if (zoom > 1 && event.pointerType !== "mouse") return false; // touch scrolls by itself
      last = [event.clientX, event.clientY];
      if (zoom === 1) moveToPointer(event);
      return true;
    },
    (event) => {
      if (zoom === 1) return moveToPointer(event);
      viewport.scrollBy(last[0] - event.clientX, last[1] - event.clientY);
      last = [event.clientX, event.clientY];
    },
  );
  divider.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 0.1 : 0.01;
    const moves = {
      ArrowLeft: share - step, ArrowDown: share - step, ArrowRight: share + step, ArrowUp: share + step,
      PageDown: share - 0.1, PageUp: share + 0.1, Home: 0, End: 1,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    moveTo(moves[event.key]);
  });
  figure.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "+" || event.key === "=") zoomTo(zoom * 2);
    else if (event.key === "-") zoomTo(zoom / 2);
    else if (event.key === "0") zoomTo(1);
  });
  viewport.addEventListener("scroll", draw);
  window.addEventListener("resize", draw);
  tools.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.zoom) return zoomTo(button.dataset.zoom === "in" ? zoom * 2 : zoom / 2);
    figure.querySelectorAll("[data-frame]").forEach((pair) => { pair.hidden = pair.dataset.frame !== button.dataset.show; });
    tools.querySelectorAll("[data-show]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    draw();
  });

  // The view keeps its shape while the picture in it grows.
  const picture = figure.querySelector("img");
  viewport.style.aspectRatio = `${picture.getAttribute("width")} / ${picture.getAttribute("height")}`;
  figure.classList.add("ready");
  divider.hidden = false;
  tools.hidden = false;
  zoomTo(1);
});
