// The study: one group of videos after another, answers kept in this browser and saved as a file. Nothing is sent.
"use strict";
(() => {
  const study = JSON.parse(document.getElementById("study").textContent);
  const $ = (id) => document.getElementById(id);
  const screens = ["welcome", "trial", "end"];
  const figures = Array.from(document.querySelectorAll(".grid figure"));
  const videos = figures.map((figure) => figure.querySelector("video"));
  const grid = document.querySelector(".grid");
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let state = null; // {format, study, rater, trials, started, at, answers: {trial: {choices: {axis: file}, seconds}}}
  let shownAt = 0;

  const plan = () => study.plans[state.rater - 1];
  const filesOf = (trial) => trial[1].map((file) => study.items[trial[0]].files[file]);
  const place = (rater) => `luve-study-${study.study}-${rater}`;
  function keep() {
    try {
      localStorage.setItem(place(state.rater), JSON.stringify(state));
    } catch {
      $("who").textContent = "This browser keeps nothing: do not close the page before you have saved.";
    }
  }
  function kept(rater) {
    try {
      const found = JSON.parse(localStorage.getItem(place(rater)));
      return found && found.study === study.study && found.rater === rater ? found : null;
    } catch {
      return null;
    }
  }

  function show(name) {
    screens.forEach((screen) => { $(screen).hidden = screen !== name; });
    $("where").hidden = name === "welcome";
    if (name !== "trial") videos.forEach((video) => video.pause());
    $(`${name}-heading`).focus();
    scrollTo(0, 0);
  }
  function begin(rater) {
    state = kept(rater) || {
      format: study.format, study: study.study, rater, trials: study.plans[rater - 1].length,
      started: new Date().toISOString(), at: 0, answers: {},
    };
    $("who").textContent = `Rater ${rater}.`;
    keep();
    state.at >= plan().length ? finish() : showTrial();
  }

  function showTrial() {
    const trial = plan()[state.at];
    const answer = state.answers[state.at];
    $("trial-heading").textContent = `Group ${state.at + 1} of ${plan().length}`;
    $("progress").value = state.at;
    $("prompt").textContent = study.items[trial[0]].prompt;
    $("prompt").hidden = !study.items[trial[0]].prompt;
    filesOf(trial).forEach((file, position) => {
      figures[position].querySelector(".wrong").hidden = true;
      videos[position].src = `videos/${file}`;
      videos[position].load();
    });
    enlarge(null);
    document.querySelectorAll("[data-axis]").forEach((fieldset) => {
      const chosen = answer && filesOf(trial).indexOf(answer.choices[fieldset.dataset.axis]);
      fieldset.querySelectorAll("input").forEach((input, position) => { input.checked = position === chosen; });
      fieldset.classList.remove("lacking");
    });
    $("missing").textContent = "";
    $("back").disabled = state.at === 0;
    show("trial");
    shownAt = performance.now();
    playing(!calm);
  }
  function choices() {
    const files = filesOf(plan()[state.at]);
    const found = {};
    document.querySelectorAll("[data-axis] input:checked").forEach((input) => { found[input.name] = files[Number(input.value)]; });
    return found;
  }
  function record() {
    const found = choices();
    if (!Object.keys(found).length) return;
    const before = state.answers[state.at] ? state.answers[state.at].seconds : 0;
    const seconds = Math.round((before + (performance.now() - shownAt) / 1000) * 10) / 10;
    shownAt = performance.now();
    state.answers[state.at] = { choices: found, seconds };
    keep();
  }
  function next() {
    const found = choices();
    const lacking = Array.from(document.querySelectorAll("[data-axis]")).filter((fieldset) => !(fieldset.dataset.axis in found));
    document.querySelectorAll("[data-axis]").forEach((fieldset) => fieldset.classList.toggle("lacking", lacking.includes(fieldset)));
    if (lacking.length) {
      $("missing").textContent = `Not answered yet: ${lacking.map((fieldset) => fieldset.querySelector("legend").textContent).join(" ")}`;
      lacking[0].querySelector("input").focus();
      return;
    }
    record();
    state.at += 1;
    keep();
    state.at >= plan().length ? finish() : showTrial();
  }
  function back() {
    if (state.at < plan().length) record();
    state.at -= 1;
    keep();
    showTrial();
  }
  function finish() {
    $("copy").value = text();
    show("end");
  }

  function text() {
    const answers = Object.keys(state.answers).map(Number).sort((a, b) => a - b)
      .map((trial) => ({ trial: trial + 1, ...state.answers[trial] }));
    const { format, rater, trials, started } = state;
    return JSON.stringify({ format, study: state.study, rater, trials, started, saved: new Date().toISOString(), answers }, null, 1);
  }
  function save() {
    if (!$("trial").hidden) record();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text()], { type: "application/json" }));
    link.download = `answers-${state.study}-rater-${String(state.rater).padStart(3, "0")}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function playing(on) {
    $("play").textContent = on ? "Pause" : "Play";
    videos.forEach((video) => { on ? video.play().catch(() => {}) : video.pause(); });
  }
  function enlarge(figure) {
    grid.classList.toggle("one", figure !== null);
    figures.forEach((other) => {
      const button = other.querySelector("[data-enlarge]");
      other.classList.toggle("large", other === figure);
      button.setAttribute("aria-pressed", String(other === figure));
      button.textContent = other === figure ? "Show all" : "Enlarge";
    });
  }
  videos.forEach((video, position) => {
    video.addEventListener("error", () => { figures[position].querySelector(".wrong").hidden = false; });
    // One shape for all, so that nothing jumps and no method is given away by its size.
    video.addEventListener("loadedmetadata", () => {
      if (position === 0) grid.style.setProperty("--ratio", String(video.videoWidth / video.videoHeight));
    });
    figures[position].querySelector("[data-enlarge]").addEventListener("click", () => {
      enlarge(figures[position].classList.contains("large") ? null : figures[position]);
    });
  });

  $("play").addEventListener("click", () => playing($("play").textContent === "Play"));
  $("restart").addEventListener("click", () => { videos.forEach((video) => { video.currentTime = 0; }); playing(true); });
  $("next").addEventListener("click", next);
  $("back").addEventListener("click", back);
  $("review").addEventListener("click", back);
  document.querySelector(".questions").addEventListener("change", record);
  document.querySelectorAll("[data-save]").forEach((button) => button.addEventListener("click", save));

  const known = (number) => Number.isInteger(number) && number >= 1 && number <= study.plans.length;
  const asked = Number(new URLSearchParams(location.search).get("rater"));
  $("ask").hidden = known(asked);
  if (known(asked) && kept(asked)) $("begin").textContent = "Go on";
  function start() {
    const rater = known(asked) ? asked : Number($("rater").value);
    if (known(rater)) return begin(rater);
    $("wrong").textContent = `Please give your number, from 1 to ${study.plans.length}.`;
    $("rater").focus();
  }
  $("begin").addEventListener("click", start);
  $("rater").addEventListener("keydown", (event) => { if (event.key === "Enter") start(); });
  show("welcome");
})();
