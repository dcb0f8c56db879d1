// Requests to the service: keys, problem details, and waiting when it says that it is busy.

let key = null;

/** What went wrong, in words for the person at the page. */
export class Failure extends Error {
  constructor(title, detail, { status = 0, code = "" } = {}) {
    super(detail);
    Object.assign(this, { title, status, code });
  }
}

/** Use this key from now on; null: none. It is held in memory alone. */
export function useKey(value) {
  key = value;
}

const PATIENCE = 4;
const LONGEST_WAIT = 5;

/** GET or POST, with a key where there is one; a busy service is asked again. Throws Failure or AbortError. */
export async function call(path, { body = null, json = null, signal = null } = {}) {
  const headers = {};
  if (key !== null) headers.authorization = `Bearer ${key}`;
  if (json !== null) headers["content-type"] = "application/json";
  const options = { method: body === null && json === null ? "GET" : "POST", headers, signal, cache: "no-cache" };
  if (options.method === "POST") options.body = json === null ? body : JSON.stringify(json);
  for (let attempt = 1; ; attempt++) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server cannot be reached", "Check that it is running and that you are connected, then try again.");
    }
    if (answer.ok) return answer;
    // Without Retry-After the same request would end in the same way.
    const wait = answer.status === 429 || answer.status === 503 ? Number(answer.headers.get("retry-after")) : 0;
    if (!wait || attempt === PATIENCE) throw await failure(answer);
    await pause(Math.min(wait, LONGEST_WAIT), signal);
  }
}

/** The same, read as JSON. */
export async function ask(path, options) {
  const answer = await call(path, options);
  try {
    return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The answer cannot be read", "The server sent something else than JSON.");
  }
}

/** An address for an <img>: with a key the picture must be fetched, since <img> sends no header. */
export async function picture(path) {
  if (key === null) return path;
  return URL.createObjectURL(await (await call(path)).blob());
}

async function failure(answer) {
  let problem = {};
  try {
    problem = await answer.json();
  } catch {
    // Not a problem document: a proxy in between, perhaps.
  }
  const detail = problem.detail || `The server answered with status ${answer.status}.`;
  return new Failure(problem.title, detail, { status: answer.status, code: problem.code });
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, 1000 * seconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
