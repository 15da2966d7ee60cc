// The turns of a conversation: the messages for the server, and their elements on the page.

import { readAttention } from "./api.js";
import { button, element, find, showProblem, showStatus } from "./elements.js";
import { describeShares, showShares } from "./files.js";
import { readDecoding, readSampling } from "./settings.js";

let hasAttention = true; // whether the server can show what was read
let turns = []; // {question, files, answer}; `answer` is null while it is decoded

export function offerAttention(is) {
  hasAttention = is;
}

export const hasTurns = () => turns.length > 0;

export const filesOfTurns = () => turns.flatMap(({ files }) => files);

export function clearConversation() {
  turns = [];
  find("conversation").replaceChildren();
}

function makeMessages(upTo) {
  return upTo.flatMap(({ question, files, answer }) => {
    const media = files.map(({ id }) => ({ type: "file", file: { file_id: id } }));
    const asked = { role: "user", content: [...media, { type: "text", text: question }] };
    return answer === null ? [asked] : [asked, { role: "assistant", content: answer }];
  });
}

// Add a question to the conversation. Returns the request for the server and functions that show the answer.
export function addQuestion(question, files) {
  const turn = { question, files, answer: null };
  const asked = element("li", { className: "question" }, element("p", {}, question));
  if (files.length) asked.prepend(element("ul", {}, ...files.map(({ card }) => card)));
  const text = element("p", {});
  const answer = element("li", { className: "answer streaming", "aria-busy": "true" }, text);
  find("conversation").append(asked, answer);
  answer.scrollIntoView({ block: "end" });
  turns.push(turn);
  const request = { messages: makeMessages(turns), ...readSampling(), ...readDecoding() };
  return {
    request,
    append(piece) {
      text.textContent += piece;
      answer.scrollIntoView({ block: "end" });
    },
    finish(stopped) {
      turn.answer = text.textContent;
      endStreaming(answer);
      answer.append(makeActions(turn, text, turns.length, stopped));
      answer.scrollIntoView({ block: "end" });
    },
    discard() {
      turns = turns.filter((other) => other !== turn);
      asked.remove();
      answer.remove();
    },
  };
}

function endStreaming(answer) {
  answer.classList.remove("streaming");
  answer.removeAttribute("aria-busy");
}

function makeActions(turn, text, count, stopped) {
  const copy = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(turn.answer);
      showStatus("Copied.");
    } catch {
      getSelection().selectAllChildren(text);
      showStatus("Selected: copy with Ctrl+C.");
    }
  });
  const actions = element("div", { className: "actions" }, copy);
  const files = turns.slice(0, count).flatMap((one) => one.files);
  if (hasAttention && files.length && turn.answer) {
    const show = button("Show what was read", () => toggleAttention(turn, text, count, files, show));
    show.setAttribute("aria-pressed", "false");
    actions.append(show);
  }
  if (stopped) actions.append(element("span", { className: "quiet" }, "stopped"));
  return actions;
}

async function toggleAttention(turn, text, count, files, show) {
  if (show.getAttribute("aria-pressed") === "true") {
    show.setAttribute("aria-pressed", "false");
    text.replaceChildren(turn.answer);
    files.forEach((file) => showShares(file, null));
    showStatus("");
    return;
  }
  show.disabled = true;
  showStatus("Computing attention …");
  try {
    const { tokens } = await readAttention({ messages: makeMessages(turns.slice(0, count)), ...readSampling() });
    text.replaceChildren(makeTokens(tokens, files));
    show.setAttribute("aria-pressed", "true");
    text.querySelector('[role="option"]')?.focus();
  } catch (error) {
    showStatus("");
    showProblem(error.message);
  }
  show.disabled = false;
}

// A list of tokens, of which arrow keys or a click select one.
function makeTokens(tokens, files) {
  const options = tokens.map((token) =>
    element("span", { role: "option", tabIndex: -1, "aria-selected": "false" }, token.text),
  );
  const select = (number) => {
    options.forEach((option, other) => {
      option.setAttribute("aria-selected", String(other === number));
      option.tabIndex = other === number ? 0 : -1;
    });
    files.forEach((file, index) => showShares(file, tokens[number].files[index]));
    const described = files.map((file, index) => describeShares(file, tokens[number].files[index]));
    showStatus(`“${tokens[number].text.trim()}” reads ${described.filter(Boolean).join(". ")}`);
  };
  options.forEach((option, number) => {
    option.onclick = option.onfocus = () => select(number);
  });
  const list = element("span", { className: "tokens", role: "listbox", "aria-label": "Tokens of the answer" }, ...options);
  list.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    options[options.indexOf(document.activeElement) + step]?.focus();
  };
  if (options.length) options[0].tabIndex = 0;
  return list;
}
