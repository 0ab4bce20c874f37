// The fields: their defaults, which of them a task has, their values, and problems at them.

const HINTS = {
  text: "Draws what the prompt says.",
  image: "Draws an image anew: more strength, less of the old one.",
  inpaint: "Paint over what is to be drawn anew. All other pixels stay as they are.",
  outpaint: "Continues an image beyond its edges.",
  colorize: "Gives colours to a grey image; its lightness stays.",
  restore: "Removes noise, blur or traces of JPEG, or enlarges.",
};
const TASKS = { text: "text_to_image", image: "image_to_image" };
const form = document.getElementById("form");
const tabs = [...form.querySelectorAll("[role=tab]")];
const named = [...form.elements].filter((field) => field.name);
let onTaskChange = () => {};
/** The values of fields that tasks have of their own, by task. */
const kept = {};
let info, tab, task, fromModel = {};

/** @param onTab called when the task has changed. */
export function startForm(given, onTab) {
  info = given;
  options("sampler", { "": "Model’s own", ...info.samplers });
  options("timestep_spacing", { "": "Automatic", ...info.spacings });
  options("model", Object.fromEntries(info.models.map((name) => [name, name])));
  options("vae", Object.fromEntries([["", "Model’s own"], ...info.vaes.map((name) => [name, name])]));
  document.getElementById("model-field").hidden = info.models.length < 2;
  document.getElementById("vae-field").hidden = !info.vaes.length;
  form.elements.num_inference_steps.max = info.max_steps;
  for (const button of tabs) button.addEventListener("click", () => selectTab(button.dataset.tab));
  form.querySelector("[role=tablist]").addEventListener("keydown", onTabKey);
  form.elements.kind.addEventListener("change", () => selectTab(tab));
  form.elements.model.addEventListener("change", modelChanged);
  form.addEventListener("input", (event) => {
    clearProblem(event.target);
    showStrength();
  });
  onTaskChange = onTab;
  reset();
  selectTab("text");
}

export const currentTask = () => task;
export const currentModel = () => form.elements.model.value || info.models[0];

/** All fields as they are when the page opens. */
export function reset() {
  for (const name of Object.keys(kept)) delete kept[name];
  fromModel = {};
  for (const field of named) field.value = standard(field.name);
  for (const name of ["sampler", "timestep_spacing", "vae"]) form.elements[name].value = "";
  form.elements.model.value = info.models[0];
  form.elements.kind.value = "denoise";
  form.elements.prompt_syntax.value = "a1111";
  modelChanged();
  showStrength();
}

/** What is meant by leaving a field out. */
function standard(name) {
  const usual = info.tasks[task ?? "text_to_image"][name] ?? fromModel[name];
  return usual ?? info.tasks.text_to_image[name] ?? "";
}

/** Put in the model's own values where those of the one before stood. */
export function modelChanged(_, fresh = info) {
  info = fresh;
  const usual = info.defaults[currentModel()] ?? {};
  for (const name of ["width", "height", "guidance_scale"]) {
    const field = form.elements[name];
    field.placeholder = "model’s own";
    if (field.value === String(fromModel[name] ?? "")) field.value = usual[name] ?? "";
  }
  for (const name of ["width", "height"]) form.elements[name].step = usual.multiple ?? 1;
  const own = usual.sampler ? ` (${info.samplers[usual.sampler]})` : "";
  form.elements.sampler.options[0].textContent = `Model’s own${own}`;
  fromModel = usual;
}

export function selectTab(name, focus = false) {
  const kind = form.elements.kind.value;
  const next = name === "restore" && kind === "upscale" ? "upscale" : (TASKS[name] ?? name);
  keepValues(next);
  [tab, task] = [name, next];
  for (const button of tabs) {
    const chosen = button.dataset.tab === name;
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
    if (chosen && focus) button.focus();
    if (chosen) document.getElementById("panel").setAttribute("aria-labelledby", button.id);
  }
  for (const part of form.querySelectorAll("[data-for]")) {
    const tasks = part.dataset.for.split(" ");
    part.classList.toggle("absent", !tasks.includes(task) && !tasks.includes(`${task}:${kind}`));
  }
  document.getElementById("hint").textContent = HINTS[name];
  clearProblem();
  showStrength();
  onTaskChange(task);
}

/** Strength and the like mean something else in each task. */
function keepValues(next) {
  const own = named.filter((field) => field.closest("[data-for]") && field.name !== "kind");
  if (task) kept[task] = Object.fromEntries(own.map((field) => [field.name, field.value]));
  task = next;
  for (const field of own) field.value = kept[next]?.[field.name] ?? standard(field.name);
}

function onTabKey(event) {
  const at = tabs.findIndex((button) => button.dataset.tab === tab);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  selectTab(tabs[(to + tabs.length) % tabs.length].dataset.tab, true);
}

/** What to ask for: fields that differ from what is meant by leaving them out. */
export function asked() {
  const values = { previews: true };
  for (const field of named) {
    const { name, value } = field;
    if (!(name in info.tasks[task]) || field.closest(".absent") || value === "") continue;
    if (name !== "kind" && value === String(standard(name))) continue;
    if (name === "seed" && value.trim() === "-1") continue; // as A1111 writes "random"
    values[name] = ["number", "range"].includes(field.type) ? Number(value) : value;
    if (name === "fill") values[name] = value === "true";
  }
  if (values.model === info.models[0]) delete values.model;
  return values;
}

/** Put the settings of an image into the fields; gives what could not be put in, in words. */
export function fill(settings) {
  const values = { ...settings, ...settings.arguments, num_images: 1 };
  values.prompt = withLoras(settings);
  values.model = settings.model?.name;
  values.vae = settings.model?.vae;
  const byTask = { text_to_image: "text", image_to_image: "image", variations: "image", upscale: "restore" };
  const name = byTask[settings.task] ?? settings.task ?? "text";
  const missing = [];
  if (!tabs.some((button) => button.dataset.tab === name)) {
    return [`It was made by ${name}, which this page does not offer.`];
  }
  if (settings.task === "upscale") values.kind = "upscale";
  reset();
  form.elements.kind.value = values.kind ?? "denoise";
  selectTab(name);
  if (values.model && info.models.includes(values.model)) form.elements.model.value = values.model;
  else if (values.model) missing.push(`This server does not have its model, ${values.model}.`);
  modelChanged();
  for (const field of named) {
    const value = values[field.name];
    if (value == null || ["kind", "model"].includes(field.name)) continue;
    field.value = value;
    if (field.value !== String(value) && field.tagName === "SELECT") {
      field.value = "";
      missing.push(`This server does not have its ${labelOf(field)}, ${value}.`);
    }
  }
  showStrength();
  return missing;
}

/** The prompt with the tags of its LoRA files, which are recorded apart from it. */
function withLoras(settings) {
  if (settings.template) return settings.template;
  const known = (settings.loras ?? []).filter((one) => info.loras.includes(one.name));
  const tags = known.map((one) => ` <lora:${one.name}:${one.weight}>`);
  return (settings.prompt ?? "") + (settings.loras?.some((one) => one.hash) ? "" : tags.join(""));
}

export function showProblem(problem) {
  clearProblem();
  const field = problem.field ? form.elements[problem.field] : null;
  const place = field && !field.closest(".absent") ? field.closest(".field") : null;
  const images = { image: "choose", mask_image: "mask" };
  const other = images[problem.field] && document.getElementById(images[problem.field]);
  const target = place ? field : other?.checkVisibility() ? other : null;
  const message = problem.message.replace(new RegExp(`^${problem.field}( |: )`), (_, sign) =>
    place ? `${labelOf(field)}${sign}` : other ? `The ${problem.field.replace("_image", "")}${sign}` : _);
  if (!target) {
    document.getElementById("problem").textContent = message;
    return;
  }
  const text = document.createElement("p");
  text.className = "problem";
  text.id = "field-problem";
  text.setAttribute("role", "alert");
  text.textContent = message;
  (place ?? target.parentElement).after(text);
  target.setAttribute("aria-invalid", "true");
  target.setAttribute("aria-describedby", text.id);
  const closed = target.closest("details");
  if (closed) closed.open = true;
  target.focus();
}

/** Of one field, or of all. */
export function clearProblem(of) {
  if (of && of.getAttribute("aria-invalid") !== "true") return;
  document.getElementById("problem").textContent = "";
  document.getElementById("field-problem")?.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

export function labelOf(field) {
  const label = field.closest("label");
  return label ? label.innerText.split(/[\n(,]/)[0].trim() : field.name;
}

function showStrength() {
  document.getElementById("strength-shown").textContent = form.elements.strength.value;
}

function options(name, texts) {
  const made = Object.entries(texts).map(([value, text]) => new Option(text, value));
  form.elements[name].replaceChildren(...made);
}
