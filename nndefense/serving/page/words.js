// The sentences and numbers of the page, as pure functions of the server's answers.

const SPACE = "\u00a0";

/** A probability or share in [0, 1] as people read it. */
export function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.1) return `<${SPACE}0.1${SPACE}%`;
  if (value < 100 && value > 99.9) return `>${SPACE}99.9${SPACE}%`;
  return `${value.toFixed(value === 0 || value === 100 ? 0 : 1)}${SPACE}%`;
}

/** A probability of which only a bound is known. */
export const below = (share) => (share < 0.001 ? percent(0.0001) : `<${SPACE}${percent(share)}`);

/** A number with about three digits that matter. */
export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 100 ? Math.round(value).toLocaleString("en-GB") : value.toPrecision(size < 0.001 ? 2 : 3);
}

/** A whole number with separators. */
export const count = (value) => Math.round(value).toLocaleString("en-GB");

/** "1 pixel", "2 pixels". */
export const plural = (value, word) => `${count(value)}${SPACE}${word}${value === 1 ? "" : "s"}`;

/** "1 x 8 x 8" as "8 x 8 pixels, grey". */
export function form([channels, height, width]) {
  return `${width}${SPACE}×${SPACE}${height} pixels, ${channels === 1 ? "grey" : "colour"}`;
}

/** The name of a picture, and how it is read where it has another size than the classifier takes. */
export function caption(name, width, height, shape) {
  const read = `${shape[2]}${SPACE}×${SPACE}${shape[1]}`;
  const given = `${width}${SPACE}×${SPACE}${height}`;
  return given === read ? name : `${name}, ${given}, read as ${read}`;
}

/** What the page says of itself, from GET /v1/model: facts separated by points. */
export function facts(model) {
  const parts = [`${plural(model.rows, "picture")} in the database`, `${count(model.classes.length)} classes`];
  const { votes, temperature, alpha } = model.rule;
  const rule = [`K${SPACE}=${SPACE}${model.k}`, `${model.weighting} weights`];
  if (votes === "labels") rule.push("true labels vote");
  if (temperature !== null) rule.push(`kernel exp(−d²/${Number(temperature.toPrecision(4))})`);
  if (alpha) rule.push(`${Number((100 * alpha).toPrecision(3))}${SPACE}% the classifier’s own answer`);
  parts.push(rule.join(", "));
  parts.push(`reads ${form(model.input_shape)}`);
  return parts.join(" · ");
}

const bare = (text) => ["bare", text];
const defended = (text) => ["defended", text];

// As many points apart, two classes are as likely.
const TIE = 0.05;

/** Class names in an enumeration: parts of a sentence. */
function either(names, kind) {
  const named = names.slice(0, 3).map(kind);
  const rest = names.length - named.length;
  const last = rest ? [` and ${plural(rest, "other")}`] : [" and ", named.pop()];
  return [...named.flatMap((one, place) => (place ? [", ", one] : [one])), ...last];
}

/** The classes that an opinion hardly tells apart, the likeliest first; none where one stands out. */
function tied({ probability, shares = new Map() }) {
  const near = [...shares].filter(([, share]) => share >= probability - TIE).sort((a, b) => b[1] - a[1]);
  return near.length > 1 ? near.map(([name]) => name) : [];
}

/** What leads where a picture is farther away than every clean one. */
function farther(now) {
  return now.percentile !== undefined && now.percentile !== null && now.percentile >= 1
    ? ["Farther from the database than every clean picture. "]
    : [];
}

/** What was found about a picture that is not attacked: parts of a sentence, [kind, text] or text. */
export function verdict(now) {
  const wavers = tied(now.bare);
  const says = [...farther(now), ...(wavers.length
    ? ["The classifier wavers between ", ...either(wavers, bare)]
    : ["The classifier says ", bare(now.bare.class)])];
  const why = farther(now).length ? "." : ": the picture is unlike those that it knows.";
  if (now.abstained) return [...says, ". The defence ", defended("abstains"), why];
  const divided = tied(now);
  if (divided.length) return [...says, ", and the pictures nearest to it are divided between ", ...either(divided, defended), "."];
  if (now.agree && !wavers.length) return [...says, ", and the pictures nearest to it say ", defended(now.class), " too."];
  return [...says, ", but the pictures nearest to it say ", defended(now.class), "."];
}

/** What an attack did: parts of a sentence. */
export function attacked(before, now) {
  const divided = now.abstained ? [] : tied(now);
  const close = divided.length ? [" It is divided between ", ...either(divided, defended), "."] : [];
  return [...farther(now), ...change(before, now), ...close];
}

function change(before, now) {
  const flips = now.bare.index !== before.bare.index;
  const moves = now.index !== before.index;
  const start = flips
    ? ["The classifier flips from ", bare(before.bare.class), " to ", bare(now.bare.class)]
    : ["The classifier keeps ", bare(now.bare.class)];
  if (now.abstained) return [...start, "; the defence ", defended("abstains"), before.abstained ? ", as before the attack." : "."];
  if (before.abstained) return [...start, ". The defence no longer abstains: it says ", defended(now.class), "."];
  if (!moves && flips) return [...start, ". The defence holds ", defended(now.class), "."];
  if (!moves) return [...start, ", and the defence ", defended(now.class), ": nothing moves yet."];
  if (flips && now.index === now.bare.index) return [...start, ", and the defence falls with it, to ", defended(now.class), "."];
  return [...start, flips ? ", and the defence falls, from " : ", but the defence falls, from ", defended(before.class), " to ", defended(now.class), "."];
}

/** The outcome in a word, for the page's own state: held, fallen, abstained, answers or still. */
export function outcome(before, now) {
  if (now.abstained) return "abstained";
  if (before.abstained) return "answers";
  if (now.index !== before.index) return "fallen";
  return now.bare.index !== before.bare.index ? "held" : "still";
}

/** What the attack is there for. */
export const INVITATION = " Move the slider to attack it: what fools the classifier need not fool the defence.";

/** What an attack will do to the picture. */
export const attackHint = (away) => (away
  ? "Moves the picture away from the class predicted now; its true class is not known here."
  : "Moves the picture towards the class chosen; its true class is not known here.");

/** The small print under the verdict of an attack. */
export function attackNote(answer, shown) {
  const { size } = answer;
  const how = answer.attack === "classifier"
    ? `PGD on the classifier, ${plural(answer.steps, "step")}; it ignores the defence and leads`
    : `Adaptive attack on the defence, ${plural(answer.steps, "step")} a stage; it ignores abstention and leads`;
  const away = answer.towards === null
    ? `away from ${shown(answer.away_from)}, predicted before (the true class is not known here)`
    : `from ${shown(answer.away_from)}, predicted before, towards ${shown(answer.towards)}`;
  const moved = `${percent(size["normalized-l2"])} of the picture’s length, at most ${Math.round(255 * size.linf)}/255 in a pixel`;
  return `${how} ${away}. The change measures ${moved}. Predicted as shown, with 8 bits a channel.`;
}

/** How far a picture lies from the database. */
export function distance(now, model) {
  const far = ["Distance to the nearest picture ", ["", number(now.distance)]];
  if (now.percentile === null) {
    return [...far, ". How unusual that is cannot be said: the guard is not calibrated on clean pictures."];
  }
  const rank = now.percentile >= 1 ? "all" : percent(now.percentile);
  const limit = model.reject_rate;
  const text = [...far, ", farther than that of ", ["", rank], now.percentile >= 1 ? " clean pictures" : " of clean pictures", " that were held out."];
  if (limit === null) return [...text, " Abstention is off."];
  const rate = percent(limit).replace(".0", "");
  return [...text, now.abstained
    ? ` The defence abstains beyond the mark, where ${rate} of clean pictures lie.`
    : ` Beyond the mark, where ${rate} of clean pictures lie, it would abstain.`];
}

/** The size that the slider shows. */
export function epsText(norm, eps) {
  if (eps === 0) return "0";
  return norm === "linf" ? `${Math.round(eps * 255)}/255` : eps.toFixed(2);
}

/** The size of an attack for a screen reader. */
export function epsSpoken(norm, eps) {
  if (eps === 0) return "0, no attack";
  return norm === "linf" ? `${Math.round(eps * 255)} of 255 per pixel` : `${eps.toFixed(2)} of the picture's length`;
}

const TITLES = {
  unsupported_media_type: "This is no picture that can be read here",
  unsupported_image: "This is no picture that can be read here",
  type_mismatch: "This file is not what its name says",
  damaged_image: "The picture is damaged",
  empty_image: "The file is empty",
  image_too_large: "The file is too large",
  body_too_large: "The file is too large",
  too_many_pixels: "The picture is too large",
  queue_full: "The server is busy",
};

/** What went wrong, for a person: [title, detail]. */
export function trouble(error) {
  const title = TITLES[error.code] ?? error.title ?? "That did not work";
  if (error.code === "unsupported_media_type") return [title, "Give a PNG, JPEG, WebP or GIF file."];
  // The service writes details as log lines: in the lower case, without a full stop.
  const whole = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  return [title, /[.!?]$/.test(whole) ? whole : `${whole}.`];
}
