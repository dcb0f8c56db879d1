// The right-hand side: the verdict, both opinions, the distance, and the neighbours.

import { picture } from "./api.js";
import * as words from "./words.js";

const SHOWN_CLASSES = 5;
const SHOWN_NEIGHBORS = 12;
const SHORT_NAME = 3;
const WIDE_NAME = 20;

export const $ = (id) => document.getElementById(id);

/** An element with a class and text or children. */
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Put a sentence of plain and emphasised parts into an element; nothing is announced again if it stays the same. */
export function say(element, parts, tag = "strong") {
  const nodes = parts.map((part) => (typeof part === "string" ? part : make(tag, part[0], part[1])));
  const probe = make("p", "", ...nodes);
  if (probe.textContent !== element.textContent) element.replaceChildren(...probe.childNodes);
}

/** Tell the style how many letters the longest word has, so that none is broken. */
function room(element, texts) {
  const letters = Math.max(1, ...texts.flatMap((text) => text.split(/[\s\u2010-\u2015-]+/)).map((word) => word.length));
  element.style.setProperty("--letters", letters);
  return letters;
}

/** Show a prediction; `before` is that of the picture before an attack, or null, and `towards` the class that it aimed at. */
export function showAnswer(model, now, before, note, towards = null) {
  say($("verdict"), before ? words.attacked(before, now) : words.verdict(now));
  $("verdict").dataset.outcome = before ? words.outcome(before, now) : "";
  room($("verdict"), [$("verdict").textContent]);
  $("about").hidden = true;
  $("note").textContent = note;
  $("how").hidden = !note;
  $("details").hidden = false;
  showOpinions(model, now, before, towards);
  showDistance(model, now);
  showNeighbors(now);
}

function showOpinions(model, now, before, towards) {
  const was = (old, current) => (before && old !== current ? `, was ${old}` : "");
  $("bare-class").textContent = now.bare.class;
  $("bare-sure").textContent = words.percent(now.bare.probability) + was(before?.bare.class, now.bare.class);
  $("defended-class").textContent = now.abstained ? "Abstains" : now.class;
  const sure = words.percent(now.probability);
  $("defended-sure").textContent = now.abstained
    ? `would say ${now.class}, ${sure}`
    : sure + was(before?.abstained ? "abstained" : before?.class, now.class);

  for (const id of ["bare-class", "defended-class"]) room($(id), [$(id).textContent]);
  const names = likeliest(model, [now, ...(before ? [before] : [])], towards);
  const longest = Math.max(...names.map((name) => name.length));
  const column = Math.max(room($("details"), names), Math.min(longest, WIDE_NAME));
  $("details").style.setProperty("--column", column);
  $("opinions").classList.toggle("short", longest <= SHORT_NAME);
  $("classes").replaceChildren(...names.map((name) => {
    const head = make("th", "", name);
    head.scope = "row";
    const row = make("tr", name === now.class && !now.abstained ? "top-class" : "", head);
    row.append(cell("bare-value", name, now.bare, before?.bare), cell("defended-value", name, now, before));
    return row;
  }));
  $("tick-key").hidden = before === null;
}

/** The classes that any of the opinions thinks likeliest, in the order of their numbers: rows then keep their place. */
function likeliest(model, answers, towards) {
  const opinions = answers.flatMap((one) => [one, one.bare]);
  const best = new Map();
  for (const { shares } of opinions) {
    for (const [name, share] of shares) best.set(name, Math.max(share, best.get(name) ?? 0));
  }
  const order = [...best.keys()].sort((a, b) => best.get(b) - best.get(a));
  const must = new Set([...opinions.map((one) => one.class), ...(towards === null ? [] : [towards])]);
  const chosen = [...new Set([...must, ...order])].slice(0, Math.max(SHOWN_CLASSES, must.size));
  return chosen.sort((a, b) => model.classes.indexOf(a) - model.classes.indexOf(b));
}

function cell(className, name, opinion, before) {
  const share = opinion.shares.get(name);
  const bar = make("i", before ? "bar was" : "bar");
  bar.ariaHidden = "true";
  bar.style.setProperty("--p", `${100 * (share ?? 0)}%`);
  if (before) bar.style.setProperty("--was", `${100 * (before.shares.get(name) ?? 0)}%`);
  const text = share === undefined ? words.below(opinion.least) : words.percent(share);
  return make("td", className, make("div", "value", bar, make("span", "", text)));
}

function showDistance(model, now) {
  say($("distance-text"), words.distance(now, model), "b");
  const known = now.percentile !== null;
  const scale = $("scale");
  scale.hidden = !known;
  $("scale-ends").hidden = !known;
  $("details").classList.toggle("abstained", now.abstained);
  if (!known) return;
  const limited = model.reject_rate !== null;
  scale.style.setProperty("--at", `${100 * now.percentile}%`);
  scale.style.setProperty("--limit", `${100 * (1 - (model.reject_rate ?? 0))}%`);
  for (const mark of scale.querySelectorAll(".over, .limit")) mark.hidden = !limited;
  scale.ariaLabel = `Percentile ${(100 * now.percentile).toFixed(1)} of 100`
    + (limited ? `; the defence abstains beyond ${(100 * (1 - model.reject_rate)).toFixed(1)}` : "");
}

let made = [];

function showNeighbors(now) {
  const all = now.neighbors;
  room($("neighbors"), all.flatMap((one) => [one.class, one.label ?? ""]));
  const others = all.filter((one) => one.index !== now.index).reduce((sum, one) => sum + one.weight, 0);
  say($("neighbors-text"), [
    `The defence averages what the classifier says of ${all.length === 1 ? "this picture" : `these ${all.length}`}. `,
    ["", words.percent(1 - others)], " of the weight says ", ["", now.class], ".",
  ], "b");
  for (const url of made) URL.revokeObjectURL(url);
  made = [];
  const rest = all.length - SHOWN_NEIGHBORS;
  // An equal share fills a third of the bar, whatever K is.
  const full = Math.min(1, 3 / all.length);
  const show = (limit) =>
    $("neighbors").replaceChildren(...all.slice(0, limit).map((one, rank) => neighbor(one, rank, now, full)));
  show(rest > 1 ? SHOWN_NEIGHBORS : all.length);
  const more = $("more");
  more.hidden = rest <= 1;
  more.textContent = `Show the other ${rest}`;
  more.onclick = () => {
    show(all.length);
    more.hidden = true;
    const next = $("neighbors").children[SHOWN_NEIGHBORS];
    next.tabIndex = -1;
    next.focus();
  };
}

function neighbor(one, rank, now, full) {
  const image = make("img");
  image.alt = `Neighbour ${rank + 1}: ${one.label ?? one.class}`;
  const frame = make("div", "frame", image);
  const missing = () => frame.replaceChildren(make("span", "", "no picture"));
  image.addEventListener("error", missing, { once: true });
  // An address without a "/" at its start also works where the service stands under a path of another one.
  picture(`v1/neighbors/${encodeURIComponent(one.id)}/image`).then((url) => {
    if (url.startsWith("blob:")) made.push(url);
    image.src = url;
  }, missing);
  const share = make("i", "share");
  share.ariaHidden = "true";
  share.style.setProperty("--p", `${Math.min(100, (100 * one.weight) / full)}%`);
  const item = make("li", one.index === now.index ? "same" : "",
    frame,
    make("span", "says", one.class, make("small", "", ` ${words.percent(one.probability)}`)),
    share,
    make("span", "faint", `weight ${words.percent(one.weight)}`),
    make("span", "faint", `distance ${words.number(one.distance)}`));
  if (one.label !== null && one.label !== one.class) item.append(make("span", "faint", `labelled ${one.label}`));
  return item;
}
