// The page: it asks what is served, waits for a picture, and shows what the service says of it.

import { Failure, ask, useKey } from "./api.js";
import { $, showAnswer } from "./answer.js";
import { attackPanel } from "./attack.js";
import { base64, listen, press, showSamples } from "./given.js";
import { TOP, naming, prediction } from "./prediction.js";
import * as words from "./words.js";

const SMALL = 96;

let model = null;
let shown = null;
let panel = null;
let clean = null;
let source = null;
let title = "";
let running = null;
let waiting = null;

function fail(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    askForKey();
    return;
  }
  // Anything else than a failed request is a mistake in the page: the console gets its trace.
  if (!(error instanceof Failure)) console.error(error);
  tell(...words.trouble(error));
}

function tell(title, detail) {
  const head = document.createElement("b");
  head.textContent = title;
  $("error").replaceChildren(head, detail);
  $("error").hidden = false;
}

function quiet() {
  $("error").hidden = true;
}

function busy(on) {
  $("answer").classList.toggle("busy", on);
  $("answer").setAttribute("aria-busy", String(on));
}

/** Put a picture into the frame. */
function show(address, caption) {
  $("shown").src = address;
  $("shown").alt = caption;
  $("shown").hidden = false;
  $("invite").hidden = true;
  $("stage").classList.add("filled");
  $("shown-caption").textContent = caption;
}

/** On a narrow screen the verdict lies below what it answers to: bring it into sight. */
function reveal() {
  if (matchMedia("(max-width: 820px)").matches) $("verdict").scrollIntoView({ block: "nearest" });
}

/** A picture was given: classify it. */
async function take(blob, name, button = null, first = false) {
  quiet();
  panel?.stop();
  running?.abort();
  const mine = new AbortController();
  running = mine;
  if (model === null) {
    waiting = [blob, name, button];
    return;
  }
  busy(true);
  try {
    const body = new FormData();
    body.append("files", blob, "picture");
    body.append("top", String(TOP));
    body.append("neighbors", String(model.k));
    const answer = await ask("v1/classify", { body, signal: mine.signal });
    const data = await base64(blob);
    if (running !== mine) return;
    clean = prediction(answer.predictions[0], shown);
    if (source) URL.revokeObjectURL(source);
    source = URL.createObjectURL(blob);
    press(button);
    title = name;
    show(source, title);
    await $("shown").decode();
    if (running !== mine) return;
    title = words.caption(name, $("shown").naturalWidth, $("shown").naturalHeight, model.input_shape);
    $("shown-caption").textContent = title;
    $("pair").hidden = true;
    showAnswer(model, clean, null, "");
    $("choose").textContent = "Choose another picture";
    panel?.take(data, clean.bare.class);
    if (!first) reveal();
  } catch (error) {
    if (running !== mine) return;
    if (error.status === 401) waiting = [blob, name, button];
    fail(error);
  } finally {
    if (running === mine) busy(false);
  }
}

/** An attack has ended, or (null) the slider is back at 0. */
function attacked(answer) {
  quiet();
  $("pair").hidden = answer === null;
  if (answer === null) {
    show(source, title);
    showAnswer(model, clean, null, "");
    return;
  }
  const png = (text) => `data:image/png;base64,${text}`;
  show(png(answer.attacked.image), "After the attack");
  $("before").src = png(answer.clean.image);
  $("difference").src = png(answer.difference.image);
  const times = `Difference × ${words.count(answer.difference.magnification)}`;
  $("difference").alt = `${times}; grey is no change`;
  $("difference-caption").textContent = times;
  const [now, before] = [answer.attacked, answer.clean].map((one) => prediction(one.prediction, shown));
  showAnswer(model, now, before, words.attackNote(answer, shown), shown(answer.towards));
  // Once the pictures above it have their height; where others take their place before, these bring it into sight.
  Promise.all(["shown", "before", "difference"].map((id) => $(id).decode())).then(reveal, () => {});
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
  tell("A key is needed", $("key").dataset.tried ? "That key was not accepted: check it and try again." : "This service answers only those who have one.");
}

async function begin() {
  const [settings, described] = await Promise.all([ask("page/settings.json"), ask("v1/model")]);
  shown = naming(described.classes, settings.names);
  model = { ...described, classes: described.classes.map(shown) };
  document.title = `Nearest-neighbour defence: ${words.plural(model.rows, "picture")}`;
  $("facts").textContent = words.facts(model);
  const [, height, width] = model.input_shape;
  document.documentElement.style.setProperty("--shape", `${width} / ${height}`);
  document.body.classList.toggle("small", Math.max(height, width) <= SMALL);
  if (settings.demo_attacks && panel === null) {
    $("start").append(words.INVITATION);
    panel = attackPanel(settings.demo_attacks, model, { shown: attacked, failed: fail, busy });
  }
  if (waiting) {
    const [blob, name, button] = waiting;
    waiting = null;
    take(blob, name, button);
  }
  const { samples } = await ask("v1/samples");
  const first = showSamples(samples, shown, take);
  if (first !== null && running === null) take(...first, true);
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key").dataset.tried = "yes";
  $("key-form").hidden = true;
  quiet();
  begin().catch(fail);
});
listen(take, tell);
begin().catch(fail);
