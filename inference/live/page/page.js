// The page: one conversation at a time, and what it leaves in the inner weights.
"use strict";

const HANDSHAKE = 0, TEXT = 2, METADATA = 4, PCM = 16;
const SESSION = "moshi-ttt-session";
const MOST_POINTS = 600;

const element = (id) => document.getElementById(id);
const parts = Object.fromEntries(
  ["status", "token-field", "token", "start", "go-on", "stop", "keep-field", "keep", "you", "moshi", "words",
    "layers", "no-memory"].map((id) => [id, element(id)]),
);

let talk = null; // the conversation under way

function say(status) {
  parts.status.textContent = status;
}

// Moshi's page can't ask for a token, this one can.
async function mayTalk() {
  const token = parts.token.value;
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch("api/access", { headers });
  if (answer.status === 401) {
    parts["token-field"].hidden = false;
    say(token ? "This token is not the server's." : "This server needs a token.");
    return false;
  }
  if (!answer.ok) {
    say(await answer.text());
    return false;
  }
  parts["keep-field"].hidden = !(await answer.json()).sessions;
  parts["go-on"].hidden = parts["keep-field"].hidden || localStorage.getItem(SESSION) === null;
  return true;
}

function level(samples) {
  let sum = 0;
  for (const sample of samples) sum += sample * sample;
  return Math.min(1, 4 * Math.sqrt(sum / samples.length));
}

async function start(session) {
  if (!(await mayTalk())) return;
  for (const id of ["start", "go-on"]) parts[id].disabled = true;
  try {
    talk = new Talk(session);
    await talk.open();
  } catch (error) {
    await stop(error.name === "NotAllowedError" ? "The microphone was not allowed." : `${error.message}`);
  }
}

async function stop(status) {
  const ended = talk;
  talk = null;
  if (ended !== null) await ended.close();
  for (const id of ["start", "go-on"]) parts[id].disabled = false;
  parts.stop.hidden = true;
  parts.start.hidden = false;
  parts["go-on"].hidden = parts["keep-field"].hidden || localStorage.getItem(SESSION) === null;
  parts.you.value = parts.moshi.value = 0;
  say(status);
}

class Talk {
  constructor(session) {
    this.session = session;
    this.opened = false;
  }

  async open() {
    say("Asking for the microphone.");
    this.microphone = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true },
    });
    this.listening = new AudioContext(); // at the device's rate, which not every browser changes
    this.speaking = new AudioContext({ sampleRate: 24000 });
    await this.listening.audioWorklet.addModule("sound.js");
    await this.speaking.audioWorklet.addModule("sound.js");
    this.loudspeaker = new AudioWorkletNode(this.speaking, "loudspeaker", { numberOfInputs: 0 });
    this.loudspeaker.connect(this.speaking.destination);
    const ear = new AudioWorkletNode(this.listening, "microphone", {
      numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit",
    });
    this.listening.createMediaStreamSource(this.microphone).connect(ear);
    ear.port.onmessage = ({ data }) => this.hear(data);
    this.connect();
  }

  connect() {
    const query = new URLSearchParams({ audio: "pcm", metadata: "1" });
    if (this.session !== null) query.set("session", this.session);
    if (parts.token.value) query.set("token", parts.token.value);
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    say("Connecting.");
    this.socket = new WebSocket(`${scheme}//${location.host}/api/chat?${query}`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.receive(new Uint8Array(data));
    this.socket.onclose = (event) => this.closed(event);
  }

  async closed(event) {
    if (talk !== this) return;
    if (this.opened) return stop(event.reason || "The connection ended.");
    // A browser does not tell why a server refused.
    const health = await (await fetch("healthz")).json();
    if (health.active >= health.slots) return stop("All places are taken; try again later.");
    if (this.session !== null && this.session !== "new") {
      localStorage.removeItem(SESSION);
      return stop("That conversation is not there any more.");
    }
    return stop("The server refused the conversation.");
  }

  hear(frame) {
    parts.you.value = level(Float32Array.from(frame, (sample) => sample / 32768));
    if (!this.opened || this.socket.readyState !== WebSocket.OPEN) return;
    const message = new Uint8Array(1 + frame.byteLength);
    message[0] = PCM;
    message.set(new Uint8Array(frame.buffer), 1);
    this.socket.send(message);
  }

  receive(message) {
    const payload = message.slice(1);
    if (message[0] === HANDSHAKE) {
      this.opened = true;
      parts.words.textContent = "";
      memory.clear();
      parts.start.hidden = parts["go-on"].hidden = true;
      parts.stop.hidden = false;
      say("Talk. Moshi listens all the time.");
    } else if (message[0] === PCM) {
      const samples = Float32Array.from(new Int16Array(payload.buffer), (sample) => sample / 32768);
      parts.moshi.value = level(samples);
      this.loudspeaker.port.postMessage(samples);
    } else if (message[0] === TEXT) {
      parts.words.append(new TextDecoder().decode(payload));
      parts.words.scrollTop = parts.words.scrollHeight;
    } else if (message[0] === METADATA) {
      const content = JSON.parse(new TextDecoder().decode(payload));
      if (content.memory) memory.add(content.memory);
      else if (content.session) localStorage.setItem(SESSION, content.session);
    }
  }

  async close() {
    this.socket?.close();
    for (const track of this.microphone?.getTracks() ?? []) track.stop();
    for (const context of [this.listening, this.speaking]) await context?.close();
  }
}

// One line for each number of each layer.
class Line {
  constructor(parent, name) {
    const svgSpace = "http://www.w3.org/2000/svg";
    const row = document.createElement("div");
    row.className = "row";
    const label = document.createElement("span");
    label.textContent = name;
    const svg = document.createElementNS(svgSpace, "svg");
    svg.setAttribute("viewBox", "0 0 100 20");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    this.line = document.createElementNS(svgSpace, "polyline");
    svg.append(this.line);
    this.value = document.createElement("span");
    this.value.className = "value";
    row.append(label, svg, this.value);
    parent.append(row);
    this.points = [];
    this.every = 1; // values for one point
    this.seen = 0;
  }

  add(value) {
    this.value.textContent = value === null ? "not finite" : value.toPrecision(4);
    if (value === null || this.seen++ % this.every) return;
    this.points.push(value);
    if (this.points.length > MOST_POINTS) {
      this.points = this.points.filter((_, index) => index % 2 === 0);
      this.every *= 2;
    }
    const low = Math.min(...this.points), high = Math.max(...this.points);
    const last = Math.max(1, this.points.length - 1);
    const flat = high - low <= 1e-6 * Math.abs(high); // else rounding would fill the picture
    const place = (v) => (flat ? 10 : 18 - (16 * (v - low)) / (high - low));
    this.line.setAttribute(
      "points", this.points.map((v, index) => `${(100 * index) / last},${place(v)}`).join(" "),
    );
  }
}

const memory = {
  layers: new Map(),

  clear() {
    this.layers.clear();
    parts.layers.replaceChildren();
  },

  add(layers) {
    for (const { layer, gate, norm, change } of layers) {
      if (!this.layers.has(layer)) this.layers.set(layer, this.card(layer, norm.length));
      const lines = this.layers.get(layer);
      [gate, ...norm.flatMap((value, index) => [value, change[index]])].forEach((value, index) => {
        lines[index].add(value);
      });
    }
  },

  card(layer, count) {
    const card = document.createElement("article");
    card.className = "layer";
    const title = document.createElement("h3");
    title.textContent = `Layer ${layer}`;
    card.append(title);
    parts.layers.append(card);
    const names = ["gate"];
    for (let index = 1; index <= count; index++) names.push(`W${index} norm`, `W${index} moved`);
    return names.map((name) => new Line(card, name));
  },
};

parts.start.addEventListener("click", () => start(parts.keep.checked ? "new" : null));
parts["go-on"].addEventListener("click", () => start(localStorage.getItem(SESSION)));
parts.stop.addEventListener("click", () => stop("You left."));
mayTalk();
