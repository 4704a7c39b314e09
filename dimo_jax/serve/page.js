"use strict";

const get = (id) => document.getElementById(id);
const panels = [...document.querySelectorAll(".panel")];
const numClasses = Number(panels[0].dataset.classes);

// What is no whole number is sent as it is: the server says what is wrong with it.
const whole = (text) => (/^-?\d{1,15}$/.test(text.trim()) ? Number(text) : text.trim());
const number = (text) => (text.trim() !== "" && isFinite(text) ? Number(text) : text.trim());

function labels() {
  if (numClasses) return get("labels").value.split(/[\s,;]+/).filter(Boolean).map(whole);
  const num = Number(get("num").value);
  return Array(Math.max(0, Math.min(Math.floor(num) || 0, 1000))).fill(0);
}

function request(name) {
  const fields = { model: name, labels: labels(), seed: whole(get("seed").value) };
  for (const [id, read] of [["temperature", number], ["steps", whole]]) {
    const control = get(id);
    if (control && control.dataset.model === name) fields[id] = read(control.value);
  }
  return fields;
}

async function ask(fields) {
  let response;
  try {
    response = await fetch("draw", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(fields),
    });
  } catch {
    throw new Error("The server does not answer; is it still running?");
  }
  const answer = await response.json().catch(() => ({ error: `status ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function time(seconds) {
  if (seconds >= 1) return `${seconds.toPrecision(3)} s`;
  const milliseconds = 1000 * seconds;
  return `${milliseconds >= 100 ? Math.round(milliseconds) : milliseconds.toPrecision(2)} ms`;
}

const count = (num, word) => `${num} ${word}${num === 1 ? "" : "s"}`;

function show(panel, fields, answer) {
  const name = panel.dataset.name;
  const stem = `${name}_seed${fields.seed}`;
  panel.querySelector(".steps").textContent = count(answer.steps, "step");
  panel.querySelector(".latency b").textContent = time(answer.seconds);
  const others = answer.images_in_call - answer.images.length;
  panel.querySelector(".latency span").textContent =
    `for ${count(answer.images.length, "picture")}` +
    (others ? ` and ${others} of other visitors` : "");
  panel.querySelector(".pictures").replaceChildren(
    ...answer.images.map((source, i) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      const image = document.createElement("img");
      const what = numClasses ? `class ${fields.labels[i]}` : `number ${i + 1}`;
      link.href = image.src = source;
      link.download = `${stem}_${i}${numClasses ? `_class${fields.labels[i]}` : ""}.png`;
      link.title = `Download ${link.download}`;
      image.alt = `${name}, ${what}`;
      link.append(image);
      if (numClasses) {
        const caption = document.createElement("span");
        caption.textContent = fields.labels[i];
        caption.setAttribute("aria-hidden", "true");
        link.append(caption);
      }
      item.append(link);
      return item;
    })
  );
  const grid = panel.querySelector(".grid");
  grid.href = answer.grid;
  grid.download = `${stem}.png`;
  panel.querySelector(".downloads").hidden = false;
}

function summarise(answers) {
  if (answers.length < 2) return "";
  const [student, teacher] = answers.map((answer) => answer.seconds);
  const ratio = teacher / student;
  const times = ratio >= 100 ? Math.round(ratio) : ratio.toPrecision(2);
  return `Same classes and seeds; this time the teacher took ${times} times as long.`;
}

async function draw() {
  const button = get("draw");
  if (button.disabled) return;
  button.disabled = true;
  get("error").hidden = true;
  get("summary").textContent = "Drawing \u2026";
  panels.forEach((panel) => panel.setAttribute("aria-busy", "true"));
  try {
    const answers = await Promise.all(
      panels.map(async (panel) => {
        const fields = request(panel.dataset.name);
        const answer = await ask(fields);
        show(panel, fields, answer);
        panel.setAttribute("aria-busy", "false");
        return answer;
      })
    );
    get("summary").textContent = summarise(answers);
  } catch (error) {
    get("summary").textContent = "";
    get("error").textContent = error.message;
    get("error").hidden = false;
  } finally {
    panels.forEach((panel) => panel.setAttribute("aria-busy", "false"));
    button.disabled = false;
  }
}

get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
get("dice").addEventListener("click", () => {
  get("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
  draw();
});
for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    get("labels").value = [...labels(), chip.dataset.label].join(", ");
  });
}
if (numClasses) {
  get("random").addEventListener("click", () => {
    const num = labels().length || 8;
    const pick = () => Math.floor(Math.random() * numClasses);
    get("labels").value = Array.from({ length: num }, pick).join(", ");
  });
  get("clear").addEventListener("click", () => {
    get("labels").value = "";
    get("labels").focus();
  });
}
draw();
