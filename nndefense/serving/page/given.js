// Where pictures come from: the file dialogue, drag and drop, the clipboard, and the samples.

import { $, make } from "./answer.js";

/** Call take(blob, name) for every picture that the person gives, and refuse(title, detail) for what is none. */
export function listen(take, refuse) {
  const input = $("file");
  $("choose").addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    if (input.files.length) take(input.files[0], input.files[0].name);
    // The same file may be chosen again.
    input.value = "";
  });

  const drag = (on) => document.body.classList.toggle("dragging", on);
  const files = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drag(files(event));
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && drag(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drag(false);
    const [file] = event.dataTransfer?.files ?? [];
    if (file) take(file, file.name);
    else refuse("That was no file", "Drop a picture file; a picture of another page must be saved first.");
  });

  document.addEventListener("paste", (event) => {
    if (event.target.closest?.("input[type=password]")) return;
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file) take(file, "Pasted picture");
    else refuse("There is no picture in the clipboard", "Copy a picture, not its address or its file name, and paste again.");
  });
}

/** Show the samples as buttons; take(blob, name, button) as above, with the arguments that are returned for the first. */
export function showSamples(samples, shown, take) {
  const given = samples.map((sample, place) => {
    const image = make("img");
    image.alt = sample.label === null ? `Sample ${place + 1}` : `Sample ${place + 1}, labelled ${shown(sample.label)}`;
    image.src = `data:image/png;base64,${sample.image}`;
    const button = make("button", "", image);
    button.type = "button";
    button.title = image.alt;
    button.setAttribute("aria-pressed", "false");
    const all = [blobOf(sample.image), image.alt, button];
    button.addEventListener("click", () => take(...all));
    return all;
  });
  $("samples").replaceChildren(...given.map(([, , button]) => make("li", "", button)));
  $("samples-hint").textContent = samples[0]?.held_out ? "Samples; none is in the database" : "Samples from the database: each finds itself";
  $("samples-block").hidden = given.length === 0;
  return given[0] ?? null;
}

/** PNG in base64 as a blob. */
function blobOf(text) {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}

/** Mark the sample that is shown, or none. */
export function press(button) {
  for (const one of $("samples").querySelectorAll("button")) one.setAttribute("aria-pressed", String(one === button));
}

/** A blob as base64 text. */
export function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
