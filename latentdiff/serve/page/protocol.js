// Talking with the server, and what can go wrong in words.

const IN_WORDS = {
  401: "The server asks for a key. Reload the page and enter it.",
  403: "The server does not allow this.",
  404: "The server does not know this request. Reload the page: it may have been updated.",
  413: "This is more than the server accepts. Choose a smaller working size.",
  503: "The server is stopping or starting again. Nothing is lost here; try again in a moment.",
};

/** Something that the user can do something about; `field` is the name of one, or "". */
export class Problem extends Error {
  constructor(message, field = "") {
    super(message);
    this.field = field;
  }
}

export async function getInfo() {
  return (await ask("api/info")).json();
}

/** How the image in a file was made: {program, settings, why_not}. */
export async function readSettings(file) {
  return (await ask("api/settings", { method: "POST", body: file })).json();
}

/** Have images made. Ends at once when `signal` aborts, and so does the work on the server. */
export async function make(task, asked, signal, onProgress) {
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify(asked);
  const answer = await ask(`api/${task}`, { method: "POST", headers, body, signal });
  for await (const line of linesOf(answer.body)) {
    if (line.event === "result") return line;
    if (line.event === "error") throw fromText(line.message);
    onProgress(line);
  }
  throw new Problem("The connection ended before the image was there. Try again.");
}

async function ask(path, options) {
  const answer = await reached(fetch(path, options));
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(
      "The server cannot be reached. Is it running, and are you online? What you entered is kept; try again.",
    );
  }
}

async function refusal(answer) {
  if (answer.status === 429) {
    const seconds = Number(answer.headers.get("Retry-After")) || 10;
    return new Problem(`The server has enough to do. Try again in ${duration(seconds)}.`);
  }
  if (answer.status === 422) {
    const { detail } = await answer.json().catch(() => ({}));
    if (Array.isArray(detail)) {
      const [first] = detail;
      return new Problem(first.msg.replace(/^Input should/, "This should"), String(first.loc[1] ?? ""));
    }
    if (detail) return fromText(detail);
  }
  return new Problem(
    IN_WORDS[answer.status] ?? "The server failed. Try again; if it stays so, its log says why.",
  );
}

/** Messages of the server begin with the name of the field. */
function fromText(message) {
  return new Problem(message, /^([a-z_]+)\b/.exec(message)?.[1]);
}

async function* linesOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reached(reader.read());
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

export function duration(seconds) {
  const whole = Math.max(1, Math.ceil(seconds));
  return whole < 90 ? `${whole} s` : `${Math.round(whole / 60)} min`;
}

export function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem("The file cannot be read any more. Choose it again.", "image"));
    reader.readAsDataURL(blob);
  });
}

export function toBlob(dataUrl) {
  const bytes = Uint8Array.from(atob(dataUrl.split(",")[1]), (sign) => sign.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}
