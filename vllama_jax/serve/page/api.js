// Requests to the server. Every function throws an Error whose message can be shown to a person.

const keyName = "vllama-api-key";

export function readKey() {
  return sessionStorage.getItem(keyName) ?? "";
}

export function storeKey(key) {
  sessionStorage.setItem(keyName, key);
}

async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (readKey()) headers.Authorization = `Bearer ${readKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Check that `vllama serve` is running.");
  }
  if (response.ok) return response;
  throw new Error(await describeError(response));
}

async function describeError(response) {
  if (response.status === 401) return "The server needs an API key: enter it in the settings.";
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

async function sendJson(path, body, options = {}) {
  return send(path, {
    ...options,
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

// Whether the server answers questions; false while it starts.
export async function isReady() {
  try {
    return (await fetch("health")).ok;
  } catch {
    throw new Error("The server does not answer. Check that `vllama serve` is running.");
  }
}

// Model name, limits and examples.
export async function readOverview() {
  return (await send("page/overview")).json();
}

export async function fetchExample(example) {
  const blob = await (await send(`page/examples/${encodeURIComponent(example.file)}`)).blob();
  return new File([blob], example.file, { type: blob.type });
}

// Upload a file and return its id.
export async function upload(file) {
  const form = new FormData();
  form.append("purpose", "vision");
  form.append("file", file, file.name);
  return (await (await send("v1/files", { method: "POST", body: form })).json()).id;
}

// What the model takes of an uploaded file: a report, frames and spectrograms as images.
export async function preview(id, sampling) {
  return (await sendJson("page/preview", { file_id: id, ...sampling })).json();
}

// What each token of the last answer of a conversation reads: shares of frames and audio clips for each file.
export async function readAttention(request) {
  return (await sendJson("page/attention", request)).json();
}

// Ask a question. Yields pieces of the answer; `signal` stops it.
export async function* ask(request, signal) {
  const response = await sendJson("v1/chat/completions", { ...request, stream: true }, { signal });
  for await (const event of readEvents(response.body)) {
    if (event === "[DONE]") return;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Error(chunk.error.message);
    const text = chunk.choices?.[0]?.delta?.content;
    if (text) yield text;
  }
  throw new Error("The connection ended before the answer was complete.");
}

// The data of server-sent events, which end with an empty line.
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
