// Puts the page together: what is asked for, from where images come, what becomes of results.

import { Problem, getInfo, make, readSettings, duration, toBlob, toDataUrl } from "./protocol.js";
import * as form from "./form.js";
import { loadMask, maskFile, startMask } from "./mask.js";
import { drawSource, hasImage, offerSizes, sentImage, sourceFile, takeImage, workedAt } from "./source.js";
import { addItem, endPreviews, removeShown, showItem, showPreviews, shownItem } from "./gallery.js";

const SIDES = ["left", "right", "top", "bottom"];
const byId = (id) => document.getElementById(id);
let info, running = null;
/** How many quarters of the work have been announced. */
let told = 0;

async function start() {
  startMask(announce, problem);
  try {
    info = await getInfo();
  } catch (error) {
    byId("make").disabled = true;
    return problem(error);
  }
  form.startForm(info, (task) => {
    if (hasImage()) offerSizes(limits());
    drawSource(task);
  });
  byId("lora").hidden = !info.loras.length;
  byId("lora-name").replaceChildren(...info.loras.map((name) => new Option(name)));
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("form").addEventListener("input", ({ target }) => SIDES.includes(target.name) && drawSource());
  on("cancel", () => running?.abort());
  on("defaults", form.reset);
  on("lora-add", addLora);
  on("reuse", () => reuse(shownItem()));
  on("remove", removeShown);
  for (const button of byId("send").querySelectorAll("button")) {
    button.addEventListener("click", () => sendTo(button.dataset.tab, shownItem().blob));
  }
  chooser("choose", (file) => take(file));
  chooser("open", inspect);
  document.addEventListener("keydown", onKey);
  document.addEventListener("paste", onPaste);
  onDrop();
}

async function run() {
  if (running) return;
  form.clearProblem();
  const task = form.currentTask();
  running = new AbortController();
  busy(true);
  try {
    const asked = form.asked();
    const inputs = await imagesOf(task, asked);
    const result = await make(task, asked, running.signal, onProgress);
    const items = result.images.map((one) => ({
      ...one, ...inputs, program: "latentdiff", notes: result.notes, blob: toBlob(one.image), image: null,
      name: `${task}-${one.seed}.png`,
    }));
    for (const item of [...items].reverse()) addItem(item);
    if (items.length) showItem(items[0]);
    announce(items.length === 1 ? "The image is ready." : `${items.length} images are ready.`);
    if (!info.defaults[form.currentModel()]) form.modelChanged(null, (info = await getInfo()));
  } catch (error) {
    if (error.name === "AbortError") announce("Cancelled.");
    else problem(error);
    endPreviews();
  } finally {
    running = null;
    busy(false);
  }
}

/** Add the images that a task begins from to what is asked for. */
async function imagesOf(task, asked) {
  if (!("image" in info.tasks[task])) return {};
  if (!hasImage()) throw new Problem("Choose an image to begin from first.", "image");
  asked.image = await toDataUrl(await sentImage());
  const mask = task === "inpaint" ? await maskFile() : null;
  if (mask) asked.mask_image = await toDataUrl(mask);
  return { source: sourceFile(), size: workedAt(), mask };
}

function busy(is) {
  byId("make").setAttribute("aria-disabled", is);
  byId("progress").hidden = !is;
  byId("results").setAttribute("aria-busy", is);
  if (!is) return;
  document.querySelector("progress").removeAttribute("value");
  byId("progress-text").textContent = "Sending …";
  told = 0;
  announce("Being made.");
  const stage = byId("results").getBoundingClientRect();
  if (stage.top > innerHeight * 0.7) byId("results").scrollIntoView({ block: "start" });
}

function onProgress({ ahead, made, of, step, steps, share, seconds_left, previews }) {
  const left = seconds_left ? ` · about ${duration(seconds_left)} left` : "";
  if (step) document.querySelector("progress").value = share;
  const many = of > 1 && made ? `${made} of ${of} images · ` : "";
  const place = ahead ? `In the queue, ${ahead} before it` : "Beginning …";
  byId("progress-text").textContent = step ? `${many}Step ${step} of ${steps}${left}` : place + (ahead ? left : "");
  if (!step && ahead) announce(place);
  if (Math.floor(share * 4) > told && share < 1) {
    told = Math.floor(share * 4);
    announce(`${Math.round(share * 100)} %${left}`);
  }
  showPreviews(previews);
}

/** Read how the image in a file was made, and show both. */
async function inspect(file) {
  form.clearProblem();
  try {
    const { program, settings, why_not } = await readSettings(file);
    const item = { blob: file, name: file.name, settings, program, whyNot: why_not };
    if (why_not) item.settings = { ...settings, task: undefined };
    addItem(item);
    showItem(item);
    byId("results").scrollIntoView({ block: "nearest" });
    announce(why_not ? `${file.name} was opened.` : `The settings of ${file.name} were read.`);
  } catch (error) {
    problem(error);
  }
}

async function reuse(item) {
  const missing = form.fill(item.settings);
  if (item.source) {
    await take(item.source, item.size);
    if (item.mask) await loadMask(item.mask);
  } else if (form.currentTask() !== "text_to_image") {
    missing.push("The image that it was made from is not in the file; choose it again.");
  }
  byId("problem").textContent = missing.join(" ");
  announce("Its settings are in the form.");
  document.querySelector("[role=tab][aria-selected=true]").focus();
}

function sendTo(tab, blob) {
  form.selectTab(tab, true);
  return take(blob);
}

async function take(file, size) {
  form.clearProblem();
  try {
    await takeImage(file, limits(), size);
    announce("The image is in the form.");
  } catch (error) {
    problem(error);
  }
}

/** What the size an image is worked at depends on; see `source.offerSizes`. */
function limits() {
  const { width = 512, height = 512 } = info.defaults[form.currentModel()] ?? {};
  const keeps = ["colorize", "restore", "upscale"].includes(form.currentTask());
  return { ...info, side: Math.max(width, height), keeps };
}

/** Write the tag of a LoRA file into the prompt, in place of an earlier one of that file. */
function addLora() {
  const [field, name] = [byId("form").elements.prompt, byId("lora-name").value];
  const tag = `<lora:${name}:${byId("lora-weight").value || 1}>`;
  const tags = field.value.match(/<lora:[^<>]*>/g) ?? [];
  const before = tags.find((one) => one.startsWith(`<lora:${name}:`) || one === `<lora:${name}>`);
  field.value = before ? field.value.replace(before, () => tag) : `${field.value} ${tag}`.trim();
  announce(`${tag} is in the prompt.`);
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape" && running) {
    running.abort();
  }
}

function onPaste(event) {
  const file = imageIn(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  if (form.currentTask() === "text_to_image") inspect(file);
  else take(file);
}

/** Into the form's image an image is dropped to begin from, anywhere else to be read. */
function onDrop() {
  const dragged = (is) => document.body.classList.toggle("dragged", is);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    dragged(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || dragged(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dragged(false);
    const file = imageIn(event.dataTransfer);
    if (file) byId("source").contains(event.target) ? take(file) : inspect(file);
    else problem(new Error("What was dropped is no image file."));
  });
}

const imageIn = (data) => [...data.files].find((file) => file.type.startsWith("image/"));

function chooser(id, use) {
  const input = byId(`${id}-file`);
  on(id, () => input.click());
  input.addEventListener("change", () => {
    if (input.files[0]) use(input.files[0]);
    input.value = "";
  });
}

function problem(error) {
  announce("");
  form.showProblem(error);
}

/** For those who do not see the page. */
function announce(text) {
  byId("announce").textContent = text;
}

function on(id, action) {
  byId(id).addEventListener("click", () => action());
}

start();
