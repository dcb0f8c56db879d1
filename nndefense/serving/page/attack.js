// The slider: attacks on the server, a moment after it rests, and never more than one at a time.

import { ask } from "./api.js";
import { $ } from "./answer.js";
import { TOP } from "./prediction.js";
import * as words from "./words.js";

const REST = 250;

/**
 * Make the panel work.
 *
 * offer: what the server allows: {attacks, norms: {name: {most, step, text}}, steps}.
 * neighbors: how many of them an answer shall have.
 * shown(answer): called with the server's answer, or with null where there is no attack any more.
 * failed(error): called with what went wrong.
 */
export function attackPanel(offer, neighbors, { shown, failed, busy }) {
  const slider = $("eps");
  const norm = $("norm");
  const fields = $("attack-form").elements;
  let image = null;
  let timer = 0;
  let running = null;
  let last = { eps: 0, norm: "", attack: "classifier" };

  for (const [name, { text }] of Object.entries(offer.norms)) norm.add(new Option(text, name));
  for (const radio of fields.attack) {
    const allowed = offer.attacks.includes(radio.value);
    radio.disabled = !allowed;
    if (!allowed && radio.value === "defense") $("adaptive-note").textContent = offer.reason;
  }
  scale();
  $("attack").hidden = false;

  const eps = () => Number(slider.value) * offer.norms[norm.value].step;

  function scale() {
    const { most, step } = offer.norms[norm.value];
    // The slider counts steps, so that no size is a rounded one.
    slider.max = Math.round(most / step);
    slider.step = 1;
    $("eps-most").textContent = words.epsText(norm.value, most);
    label();
  }

  function label() {
    const size = Number(slider.value) * offer.norms[norm.value].step;
    $("eps-text").textContent = words.epsText(norm.value, size);
    slider.setAttribute("aria-valuetext", words.epsSpoken(norm.value, size));
    slider.style.setProperty("--at", `${(100 * slider.value) / slider.max}%`);
  }

  function progress(text) {
    $("attack-progress").hidden = !text;
    $("attack-status").textContent = text;
    busy(Boolean(text));
  }

  function cancel() {
    clearTimeout(timer);
    timer = 0;
    running?.abort();
    running = null;
    progress("");
  }

  /** Back to what is on the page. */
  function revert() {
    norm.value = last.norm || norm.value;
    fields.attack.value = last.attack;
    scale();
    slider.value = Math.round(last.eps / offer.norms[norm.value].step);
    label();
  }

  function later(wait = REST) {
    cancel();
    label();
    if (image === null) return;
    if (Number(slider.value) === 0) {
      last = { eps: 0, norm: norm.value, attack: fields.attack.value };
      shown(null);
      return;
    }
    timer = setTimeout(start, wait);
  }

  async function start() {
    timer = 0;
    const mine = new AbortController();
    running = mine;
    const how = { attack: fields.attack.value, norm: norm.value, eps: eps(), steps: offer.steps };
    const wanted = { image, ...how, top: TOP, neighbors };
    progress(wanted.attack === "classifier" ? "Attacking the classifier …" : "Attacking the defence …");
    try {
      const answer = await ask("v1/demo/attack", { json: wanted, signal: mine.signal });
      if (running !== mine) return;
      last = wanted;
      shown(answer);
    } catch (error) {
      if (running !== mine || error.name === "AbortError") return;
      revert();
      failed(error);
    } finally {
      if (running === mine) {
        running = null;
        progress("");
      }
    }
  }

  /** End a running attack; what is on the page stays. */
  function stop() {
    if (running === null && timer === 0) return;
    const from = document.activeElement === $("stop");
    cancel();
    revert();
    if (from) slider.focus();
  }

  slider.addEventListener("input", () => later());
  norm.addEventListener("change", () => {
    const had = Number(slider.value) / slider.max;
    scale();
    slider.value = Math.round(had * slider.max);
    later(0);
  });
  $("attack-form").addEventListener("change", (event) => event.target.name === "attack" && later(0));
  $("attack-form").addEventListener("submit", (event) => event.preventDefault());
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());

  return {
    stop,
    /** Attack this picture from now on (base64), or none; the slider goes back to 0. */
    take(data) {
      cancel();
      image = data;
      last = { eps: 0, norm: norm.value, attack: fields.attack.value };
      slider.value = 0;
      label();
      $("attack-fields").disabled = data === null;
      $("eps-hint").textContent = data === null
        ? "Choose a picture first."
        : "Moves the picture away from the class predicted now; its true class is not known here.";
    },
  };
}
