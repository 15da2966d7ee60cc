// The page of `vllama serve`: connects its elements to the server.

import { ask, fetchExample, isReady, readOverview } from "./api.js";
import { addQuestion, clearConversation, filesOfTurns, hasTurns, offerAttention } from "./conversation.js";
import { button, element, find, showProblem, showStatus } from "./elements.js";
import { addFiles, clearPending, pendingFiles, refreshFiles } from "./files.js";
import { record } from "./recorder.js";
import { fillSettings, setUpSettings } from "./settings.js";

let running = null; // the AbortController of the answer that is being decoded

async function start() {
  try {
    const overview = await readOverview();
    find("model").textContent = overview.description;
    fillSettings(overview);
    offerAttention(overview.has_attention);
    find("examples").replaceChildren(...overview.examples.map(makeExample));
    showProblem("");
    while (!(await isReady())) {
      showStatus("The server is starting …");
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    showStatus("Ready.");
  } catch (error) {
    showProblem(error.message);
  }
}

function makeExample(example) {
  return element("li", {}, button(`${example.title}: “${example.question}”`, async () => {
    if (running) return;
    showProblem("");
    try {
      clearPending();
      await addFiles([await fetchExample(example)]);
      if (pendingFiles().length) await askQuestion(example.question);
    } catch (error) {
      showProblem(error.message);
    }
  }));
}

async function askQuestion(question) {
  if (!question || running) return;
  showProblem("");
  running = new AbortController();
  const controller = running;
  const files = pendingFiles();
  clearPending();
  setRunning(true);
  const turn = addQuestion(question, files);
  try {
    for await (const piece of ask(turn.request, controller.signal)) turn.append(piece);
    turn.finish(false);
  } catch (error) {
    if (controller.signal.aborted) turn.finish(true);
    else {
      turn.discard();
      giveBack(question, files);
      showProblem(error.message);
    }
  }
  setRunning(false);
}

// After an error, the question and its files are there to be changed and asked again.
function giveBack(question, files) {
  find("question").value = question;
  for (const file of files) {
    pendingFiles().push(file);
    find("attachments").append(file.card);
  }
}

function setRunning(is) {
  if (!is) running = null;
  find("send").hidden = is;
  find("stop").hidden = !is;
  find("welcome").hidden = hasTurns() || is;
  if (!is) find("question").focus();
}

function setUpControls() {
  const question = find("question");
  find("ask").onsubmit = (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (!text || running) return;
    question.value = "";
    askQuestion(text);
  };
  question.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("ask").requestSubmit();
  };
  find("stop").onclick = () => running?.abort();
  find("reset").onclick = () => {
    running?.abort();
    clearConversation();
    clearPending();
    showProblem("");
    showStatus("");
    find("welcome").hidden = false;
    question.focus();
  };
  setUpSettings((isOtherKey) => (isOtherKey ? start() : refreshFiles([...filesOfTurns(), ...pendingFiles()])));
  find("add-files").onclick = () => find("files").click();
  find("files").onchange = async ({ target }) => {
    await addFiles([...target.files]);
    target.value = "";
    question.focus();
  };
  for (const kind of ["camera", "microphone"]) {
    find(`record-${kind}`).onclick = async () => {
      showProblem("");
      const file = await record(kind);
      if (file) await addFiles([file]);
    };
  }
}

function setUpDropping() {
  const setDropping = (is) => document.body.classList.toggle("dropping", is);
  document.ondragover = (event) => {
    event.preventDefault();
    setDropping(true);
  };
  document.ondragleave = (event) => {
    if (!event.relatedTarget) setDropping(false);
  };
  document.ondrop = (event) => {
    event.preventDefault();
    setDropping(false);
    addFiles([...event.dataTransfer.files]);
  };
  document.onpaste = (event) => {
    if (event.clipboardData.files.length) addFiles([...event.clipboardData.files]);
  };
}

setUpControls();
setUpDropping();
start();
