"use strict";

const byId = (id) => document.getElementById(id);
const state = { model: null, x: {}, picture: null, crafted: null, asking: null, attacking: null };

function say(text) {
  byId("status").textContent = text;
}

function complain(text) {
  byId("alert").textContent = text;
  byId("alert").hidden = !text;
  // The button that led to it may be far below.
  if (text) byId("alert").scrollIntoView({ block: "center" });
}

function headers() {
  const found = { "content-type": "application/json" };
  const key = byId("key").value.trim();
  if (key) found.authorization = `Bearer ${key}`;
  return found;
}

// What went wrong, in the server's words.
async function reason(response) {
  let text = `The server answered ${response.status}.`;
  try {
    text = (await response.json()).error.message;
  } catch {
    // Not the server's own answer, but that of something between.
  }
  if (response.status === 401) byId("key-box").open = true;
  return new Error(text);
}

// The events of a streamed answer, one JSON value each.
async function* events(route, body, signal) {
  const response = await fetch(route, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw await reason(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection was cut before the end.");
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function defence(found) {
  if (!found) return "no defence";
  const parts = [];
  if (found.cutoff !== null) parts.push(`GIF (cutoff ${Number(found.cutoff.toFixed(2))})`);
  if (found.anchor !== null) parts.push(`FRA (anchor ${found.anchor}, α ${found.alpha}, β ${String(found.beta).replace("-", "\u2212")})`);
  return parts.join(" and ");
}

async function connect() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw await reason(response);
    const found = (await response.json()).data[0];
    state.model = found.id;
    state.x = found.x_radapt;
    byId("model").textContent = found.id;
    byId("defense").textContent = `Served with ${defence(state.x.defense)}.`;
    byId("defended-title").textContent = state.x.defense ? "Defended" : "Answer";
    byId("undefended-card").hidden = !state.x.compare;
    byId("adaptive-choice").hidden = !state.x.defense;
    byId("sample").hidden = !state.x.samples;
    complain("");
  } catch (error) {
    byId("model").textContent = "Not connected";
    complain(error.message);
  }
  update();
}

function update() {
  byId("perturb").hidden = !(state.x.perturb && state.picture);
  byId("ask").disabled = !state.model || Boolean(state.asking);
  byId("ask-stop").hidden = !state.asking;
  byId("attack").disabled = Boolean(state.attacking);
  byId("attack-stop").hidden = !state.attacking;
  byId("progress").hidden = !state.attacking;
}

function choose(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    complain("That is not a picture.");
    return;
  }
  const reader = new FileReader();
  reader.onload = () => {
    stop(state.attacking);
    state.picture = reader.result;
    byId("picture").src = state.picture;
    byId("views").hidden = false;
    forget();
    complain("");
    say(`Picture ${file.name || "pasted"} chosen.`);
    update();
  };
  reader.onerror = () => complain("The file cannot be read.");
  reader.readAsDataURL(file);
}

// The built-in model knows no photographs, but a world of its own.
async function sample() {
  try {
    const response = await fetch("/playground/sample", { headers: headers() });
    if (!response.ok) throw await reason(response);
    choose(new File([await response.blob()], "of the pocket world", { type: "image/png" }));
  } catch (error) {
    complain(error.message);
  }
}

// An adversarial picture belongs to the one it was made of.
function forget() {
  state.crafted = null;
  byId("crafted-view").hidden = true;
  byId("magnified-view").hidden = true;
  byId("facts").hidden = true;
  document.querySelector('input[name="asked"][value="picture"]').checked = true;
}

function stop(controller) {
  if (controller) controller.abort();
}

function stopped(error) {
  return error.name === "AbortError";
}

async function attack() {
  if (!state.picture || state.attacking) return;
  const controller = new AbortController();
  state.attacking = controller;
  complain("");
  forget();
  update();
  const progress = byId("progress");
  progress.value = 0;
  say("The attack runs.");
  const threat = document.querySelector('input[name="threat"]:checked').value;
  const body = { image: state.picture, eps: `${byId("eps").value}/255`, threat };
  try {
    for await (const event of events("/v1/perturb", body, controller.signal)) {
      if (event.object === "radapt.perturbation.progress") {
        progress.max = event.steps;
        progress.value = event.step;
        continue;
      }
      state.crafted = event.picture;
      byId("crafted").src = event.picture;
      byId("magnified").src = event.magnified;
      byId("crafted-name").textContent = `Adversarial (${threat})`;
      byId("magnified-name").textContent = `The change, ${Math.round(127.5 / Math.max(event.linf, 1))} times as strong`;
      const cosine = (value) => value.toFixed(3);
      byId("facts").textContent =
        `PGD, ${event.steps} steps, within ${event.eps}, ${threat}: crafted on ${event.surrogate}. ` +
        `What the language model reads keeps a cosine of ${cosine(event.cosine.undefended)} with the clean picture's undefended` +
        (state.x.defense ? `, ${cosine(event.cosine.defended)} defended.` : ".");
      byId("facts").hidden = false;
      byId("crafted-view").hidden = false;
      byId("magnified-view").hidden = false;
      document.querySelector('input[name="asked"][value="crafted"]').checked = true;
      say("The adversarial picture is there, and is the one that will be asked about.");
    }
  } catch (error) {
    if (!stopped(error)) complain(error.message);
    else say("The attack was stopped.");
  } finally {
    if (state.attacking === controller) state.attacking = null;
    update();
  }
}

function side(model) {
  return model === state.model ? "defended" : "undefended";
}

function show(pictures) {
  const box = byId("suspicion");
  const found = pictures && pictures[0];
  box.hidden = !found;
  if (!found) return;
  const suspicious = found.suspicious === true;
  box.classList.toggle("suspicious", suspicious);
  let text = `The defended and the undefended tower disagree on this picture by ${found.score.toFixed(3)}`;
  if (found.share !== null) {
    const percent = found.share * 100;
    text += `; ${percent < 10 ? percent.toFixed(1) : percent.toFixed(0)} % of clean pictures score as high or higher`;
    text += suspicious ? ": suspicious." : ": not suspicious.";
  } else {
    text += ". The server was not shown clean pictures to compare that with.";
  }
  box.textContent = text;
}

async function ask() {
  if (state.asking || !state.model) return;
  const question = byId("question").value.trim();
  if (!question) {
    complain("Ask something first.");
    byId("question").focus();
    return;
  }
  const controller = new AbortController();
  state.asking = controller;
  complain("");
  update();
  const sides = state.x.compare ? ["defended", "undefended"] : ["defended"];
  for (const name of sides) {
    byId(`${name}-text`).textContent = "";
    byId(`${name}-end`).textContent = "";
    byId(`${name}-card`).classList.add("open");
  }
  byId("answers").hidden = false;
  show(null);
  const asked = document.querySelector('input[name="asked"]:checked').value;
  const url = asked === "crafted" ? state.crafted : state.picture;
  const content = [{ type: "text", text: question }];
  if (url) content.unshift({ type: "image_url", image_url: { url } });
  const body = {
    model: state.model,
    messages: [{ role: "user", content }],
    stream: true,
    stream_options: { include_usage: true },
  };
  const route = state.x.compare ? "/v1/compare" : "/v1/chat/completions";
  try {
    for await (const event of events(route, body, controller.signal)) {
      if (event.object === "radapt.comparison") {
        show(event.pictures);
        continue;
      }
      if (event.x_radapt && event.x_radapt.pictures) show(event.x_radapt.pictures);
      const name = side(event.model);
      const choice = event.choices[0];
      if (choice && choice.delta.content) byId(`${name}-text`).textContent += choice.delta.content;
      if (choice && choice.finish_reason) {
        byId(`${name}-card`).classList.remove("open");
        if (choice.finish_reason === "length") byId(`${name}-end`).textContent = "Cut off at the most tokens. ";
      }
      if (event.usage) byId(`${name}-end`).textContent += `${event.usage.completion_tokens} tokens`;
    }
    say(sides.map((name) => `${byId(`${name}-title`).textContent}: ${byId(`${name}-text`).textContent}`).join(" "));
  } catch (error) {
    if (!stopped(error)) complain(error.message);
    else say("Stopped.");
    byId("answers").hidden = sides.every((name) => !byId(`${name}-text`).textContent);
  } finally {
    for (const name of sides) byId(`${name}-card`).classList.remove("open");
    state.asking = null;
    update();
  }
}

byId("file").addEventListener("change", (event) => choose(event.target.files[0]));
byId("eps").addEventListener("input", (event) => {
  byId("eps-shown").textContent = `${event.target.value}/255`;
  event.target.setAttribute("aria-valuetext", `${event.target.value} of 255`);
});
byId("sample").addEventListener("click", sample);
byId("attack").addEventListener("click", attack);
byId("attack-stop").addEventListener("click", () => stop(state.attacking));
byId("ask-stop").addEventListener("click", () => stop(state.asking));
byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  }
});
byId("key").addEventListener("change", connect);
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
  if (file) choose(file);
});
const drop = byId("drop");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  choose(event.dataTransfer.files[0]);
});
connect();
