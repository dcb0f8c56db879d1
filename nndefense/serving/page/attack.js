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
 * model: what is served: {classes, k}; k neighbours are asked for.
 * shown(answer): called with the server's answer, or with null where there is no attack any more.
 * failed(error): called with what went wrong.
 */
export function attackPanel(offer, model, { shown, failed, busy }) {
  const slider = $("eps");
  const norm = $("norm");
  const fields = $("attack-form").elements;
  const target = $("target");
  let image = null;
  let own = "";
  let timer = 0;
  let running = null;
  let last = { eps: 0, norm: "", attack: "classifier", target: null };

  // By number: a name could be that of a choice.
  target.append(...model.classes.map((name, number) => new Option(name, String(number))));
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

  /** Only the attack on the classifier has a target, and the class that the picture is taken for is none. */
  function aim() {
    target.disabled = fields.attack.value !== "classifier";
    for (const [number, name] of model.classes.entries()) target.options[number + 2].disabled = name === own;
    if (target.selectedOptions[0].disabled) target.value = "";
    $("eps-hint").textContent = image === null
      ? "Choose a picture first."
      : words.attackHint(target.disabled || target.value === "");
  }

  const towards = () => (target.disabled || target.value === "" ? null : target.value);

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
    target.value = last.target ?? "";
    aim();
    scale();
    slider.value = Math.round(last.eps / offer.norms[norm.value].step);
    label();
  }

  function later(wait = REST) {
    cancel();
    label();
    if (image === null) return;
    if (Number(slider.value) === 0) {
      last = { eps: 0, norm: norm.value, attack: fields.attack.value, target: towards() };
      shown(null);
      return;
    }
    timer = setTimeout(start, wait);
  }

  async function start() {
    timer = 0;
    const mine = new AbortController();
    running = mine;
    const how = { attack: fields.attack.value, norm: norm.value, eps: eps(), target: towards(), steps: offer.steps };
    const wanted = { image, ...how, top: TOP, neighbors: model.k };
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
  $("attack-form").addEventListener("change", (event) => {
    if (!["attack", "target"].includes(event.target.name)) return;
    aim();
    later(0);
  });
  $("attack-form").addEventListener("submit", (event) => event.preventDefault());
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());

  return {
    stop,
    /** Attack this picture (base64) of this class from now on, or none; the slider goes back to 0. */
    take(data, named = "") {
      cancel();
      [image, own] = [data, named];
      aim();
      last = { eps: 0, norm: norm.value, attack: fields.attack.value, target: towards() };
      slider.value = 0;
      label();
      $("attack-fields").disabled = data === null;
    },
  };
}
