// What was made since the page was opened, and files whose settings were read.

const LABELS = {
  prompt: "Prompt", negative_prompt: "Without", seed: "Seed", task: "Task", size: "Size",
  num_inference_steps: "Steps", guidance_scale: "Guidance", guidance_rescale: "Guidance rescale",
  sampler: "Sampler", timestep_spacing: "Spacing", clip_skip: "Clip skip", prompt_syntax: "Prompt syntax",
  model: "Model", loras: "LoRA", embeddings: "Words learned", strength: "Strength", kind: "Kind",
  hires_scale: "Second pass, times", hires_strength: "Second pass’ strength", mask_blur: "Mask blur",
  padding_mask_crop: "Only masked, padding", fill: "Begins from colours around", scale: "Times", noise: "Noise", blur: "Blur", quality: "Quality",
  left: "Left", right: "Right", top: "Top", bottom: "Bottom", interrupted: "Interrupted",
};
/** Of other programs' settings all are shown, of ours what `LABELS` names. */
const OURS = "latentdiff";
/** Where 0 is more than "off". */
const MEANT = ["seed", "strength", "guidance_scale"];
const list = document.getElementById("gallery");
const byId = (id) => document.getElementById(id);
let shown = null;

/** Put an image in front: {blob, name, settings, program, whyNot, notes, flagged, source, mask}. */
export function addItem(item) {
  item.url = URL.createObjectURL(item.blob);
  const image = document.createElement("img");
  image.src = item.url;
  image.alt = item.settings.prompt || item.name;
  const button = document.createElement("button");
  button.type = "button";
  button.title = image.alt;
  button.append(image);
  button.addEventListener("click", () => showItem(item));
  item.element = document.createElement("li");
  item.element.append(button);
  list.prepend(item.element);
  byId("gallery-title").hidden = false;
}

export function showItem(item) {
  shown = item;
  byId("empty").hidden = byId("previews").hidden = true;
  byId("shown").hidden = false;
  byId("shown-image").src = item.url;
  byId("shown-image").alt = item.settings.prompt || item.name;
  byId("download").href = item.url;
  byId("download").download = item.name;
  byId("reuse").disabled = !item.settings.task;
  byId("notes").replaceChildren(...remarks(item).map((text) => element("li", text)));
  byId("metadata").replaceChildren(...described(item).map(pair));
  for (const one of list.querySelectorAll("button")) one.removeAttribute("aria-current");
  item.element.firstChild.setAttribute("aria-current", "true");
}

export const shownItem = () => shown;

export function removeShown() {
  const next = shown.element.nextSibling ?? shown.element.previousSibling;
  shown.element.remove();
  URL.revokeObjectURL(shown.url);
  byId("shown").hidden = true;
  byId("empty").hidden = Boolean(next);
  byId("gallery-title").hidden = !next;
  shown = null;
  next?.firstChild.click();
  next?.firstChild.focus();
}

/** How the images look so far. */
export function showPreviews(urls) {
  if (!urls.length) return;
  byId("empty").hidden = byId("shown").hidden = true;
  byId("previews").hidden = false;
  byId("previews").replaceChildren(...urls.map((url) => {
    const image = document.createElement("img");
    image.src = url;
    image.alt = "";
    return image;
  }));
}

export function endPreviews() {
  byId("previews").hidden = true;
  byId("shown").hidden = !shown;
  byId("empty").hidden = Boolean(shown);
}

function remarks(item) {
  const by = item.program && item.program !== OURS ? `Made by ${item.program}. ` : "";
  const why = item.whyNot ? `Its settings cannot be used here: ${item.whyNot}.` : "";
  const flagged = item.flagged ? "The safety checker flags this image." : "";
  return [by + why, flagged, ...(item.notes ?? [])].filter(Boolean);
}

function described({ settings, program }) {
  const all = { ...settings, ...settings.arguments };
  if (settings.width) all.size = `${settings.width} × ${settings.height}`;
  if (settings.task) all.task = settings.task.replaceAll("_", " ");
  const names = program === OURS || settings.task ? Object.keys(LABELS) : Object.keys(all);
  return names
    .filter((name) => all[name] !== 0 || MEANT.includes(name))
    .map((name) => [LABELS[name] ?? name, inWords(all[name])])
    .filter(([, text]) => text);
}

function pair([name, text]) {
  const both = document.createElement("div");
  both.append(element("dt", name), element("dd", text));
  both.classList.toggle("wide", text.length > 20);
  return both;
}

function inWords(value) {
  if (value === null || value === undefined || value === false) return "";
  if (Array.isArray(value)) return value.map(inWords).join(", ");
  if (typeof value !== "object") return String(value);
  const name = value.name ?? value.token ?? "";
  return value.weight === undefined ? name : `${name} (${value.weight})`;
}

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}
