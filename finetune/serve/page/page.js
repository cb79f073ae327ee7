// A call: microphone or recording -> websocket -> loudspeaker, with what Moshi says and learns.

import { Plot } from "./plot.js";

const [HANDSHAKE, AUDIO, , , METADATA, ERROR] = [0, 1, 2, 3, 4, 5];
const $ = (id) => document.getElementById(id);
const plot = new Plot($("plot"), $("legend"));
const address = new URL(location.href);
let call = null; // the call that goes on
let last = null; // the one that can be downloaded

$("token").value = address.searchParams.get("token") ?? "";
if (address.searchParams.has("token")) {
  // Not in the history, nor in a screenshot of the address.
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function sentence(what, why) {
  return `${what}: ${why[0].toLowerCase()}${why.slice(1).replace(/[.?]$/, "")}.`;
}

// Everything that a person starts ends here: nothing fails without a word.
function saying(what) {
  return async (...given) => {
    try {
      await what(...given);
    } catch (error) {
      say(error.message, true);
    }
  };
}

// The answer of the server, or an error that says why there is none.
async function request(path, query, how) {
  const answer = await fetch(url(path, query), how).catch(() => {
    throw new Error("The server does not answer: is it still running, and the network there?");
  });
  if (answer.status === 401) $("token-label").hidden = false;
  if (answer.ok) return answer;
  // What a proxy answers in the server's place is a page of its own.
  const isOurs = answer.headers.get("Content-Type")?.startsWith("text/plain");
  const text = isOurs ? (await answer.text()).trim() : "";
  throw new Error(text || `The server answered ${answer.status} ${answer.statusText}`.trim());
}

function clock(sec) {
  return `${Math.floor(sec / 60)}:${String(Math.floor(sec % 60)).padStart(2, "0")}`;
}

function level(samples) {
  let sum = 0;
  for (const sample of samples) sum += sample * sample;
  return Math.min(1, 3 * Math.sqrt(sum / samples.length));
}

function toPcm(samples) {
  const pcm = new Int16Array(samples.length);
  samples.forEach((sample, i) => (pcm[i] = Math.round(Math.max(-1, Math.min(1, sample)) * 32767)));
  return pcm;
}

class Call {
  constructor(made, socket) {
    Object.assign(this, made, { socket, heard: [], said: [], frames: [], numAnswered: 0, atSec: 0, word: null });
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => this.receive(new Uint8Array(data));
    socket.onclose = ({ code, reason }) => {
      // Without a goodbye there is no reason.
      const lost = this.about ? "the connection was lost" : "the server did not take it";
      this.close(code === 1006 ? lost : reason, code !== 1000 && code !== 1005);
    };
  }

  receive(bytes) {
    const payload = bytes.slice(1);
    if (bytes[0] === AUDIO) this.play(payload);
    if (bytes[0] === ERROR) say(`The server: ${new TextDecoder().decode(payload)}`, true);
    if (bytes[0] === METADATA) this.note(JSON.parse(new TextDecoder().decode(payload)));
  }

  note(about) {
    if (about.call) return this.begin(about).catch((error) => this.fail(error));
    this.atSec = about.at_sec;
    $("time").textContent = clock(about.at_sec);
    $("latency").textContent = about.waited_ms.toFixed(0);
    // Which frame of the user's this is said to: none, if it was late and silence was heard.
    this.frames.push(about.frame);
    if (about.frame !== null) this.numAnswered = about.frame + 1;
    const behindMs = (this.heard.length - this.numAnswered) * 80;
    $("queue").textContent = behindMs;
    if (behindMs > 3000 && !this.isSlow) {
      this.isSlow = true;
      say("The model is slower than speech here: answers come later and later.", true);
    }
    if (about.text) this.write(about.text, about.at_sec);
    if (about.changes) plot.add(about.at_sec, about.changes);
  }

  async begin(about) {
    this.about = about;
    plot.begin(about.layers);
    const { context, recorder } = this;
    for (const each of new Set([context, recorder])) await each.audioWorklet.addModule("worklet.js");
    this.player = new AudioWorkletNode(context, "player", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: { startSamples: 2 * about.frame_samples },
    });
    this.player.connect(context.destination);
    const capture = new AudioWorkletNode(recorder, "capture", {
      channelCount: 1,
      channelCountMode: "explicit",
      numberOfOutputs: 1,
      processorOptions: { frameSamples: about.frame_samples, rateHz: about.rate_hz },
    });
    capture.port.onmessage = ({ data }) => this.send(data);
    this.capture = capture;
    this.source.connect(capture).connect(recorder.destination); // it is silent, but must be pulled
    this.source.start?.();
    $("ttt").checked = about.ttt_on;
    for (const id of ["forget", "ttt"]) $(id).disabled = !about.layers.length;
    for (const id of ["save", "load"]) $(id).disabled = false;
    lines.allow(true);
    say(this.isSilent ? "Connected: choose a line." : "Connected: speak.");
  }

  // Let a recorded line be heard as if the user said it; ends with the line.
  async sayLine(text, sound) {
    const buffer = await this.recorder.decodeAudioData(sound);
    if (call !== this) return;
    this.write(text, this.atSec, "you");
    const node = new AudioBufferSourceNode(this.recorder, { buffer });
    node.connect(this.capture);
    // A microphone would hear it once more.
    if (!this.stream) node.connect(this.recorder.destination);
    node.start();
    await new Promise((done) => (node.onended = this.stopLine = done));
  }

  send(samples) {
    $("user-level").value = level(samples);
    if (this.socket.readyState !== WebSocket.OPEN) return;
    const pcm = toPcm(samples);
    this.heard.push(pcm);
    this.sendMessage(AUDIO, new Uint8Array(pcm.buffer));
  }

  sendMessage(kind, payload) {
    const bytes = new Uint8Array(1 + payload.length);
    bytes[0] = kind;
    bytes.set(payload, 1);
    this.socket.send(bytes);
  }

  ask(what) {
    this.sendMessage(METADATA, new TextEncoder().encode(JSON.stringify(what)));
  }

  play(payload) {
    const pcm = new Int16Array(payload.buffer, 0, payload.length >> 1);
    const samples = Float32Array.from(pcm, (sample) => sample / 32767);
    this.said.push(pcm);
    last = this;
    $("moshi-level").value = level(samples);
    $("download").disabled = false;
    this.player?.port.postMessage(samples, [samples.buffer]);
  }

  write(text, atSec, who) {
    if (!text.trim()) {
      // The letters of the word that begins here come with the next frames.
      this.word = null;
      return;
    }
    if (text.startsWith(" ") || !this.word || who) {
      const line = document.createElement("li");
      if (who) line.className = who;
      const time = document.createElement("time");
      time.textContent = atSec.toFixed(1) + " s";
      this.word = document.createElement("span");
      line.append(time, this.word);
      $("words").append(line);
      if ($("words").children.length > 2000) $("words").firstElementChild.remove();
    }
    this.word.textContent += text.trim();
    if (who) this.word = null;
    $("words").scrollTop = $("words").scrollHeight;
  }

  fail(error) {
    this.failure = error.message;
    this.socket.close(1000);
  }

  close(reason, isError) {
    release(this);
    this.stopLine?.();
    if (call !== this) return;
    call = null;
    lines.allow(false);
    $("call").textContent = "Call";
    for (const id of ["forget", "ttt", "save", "load"]) $(id).disabled = true;
    for (const id of ["user-level", "moshi-level"]) $(id).value = 0;
    const said = this.about ? "The call has ended" : "No call";
    const why = this.failure ?? reason;
    say(why ? sentence(said, why) : `${said}.`, isError || this.failure !== undefined);
  }
}

// Whatever becomes of a call, the browser listens no longer.
function release({ stream, context, recorder }) {
  stream?.getTracks().forEach((track) => track.stop());
  for (const each of new Set([context, recorder])) {
    if (each && each.state !== "closed") each.close();
  }
}

async function microphone() {
  if (!navigator.mediaDevices) {
    throw new Error("a browser gives the microphone to https or this machine's own pages alone");
  }
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: true, noiseSuppression: true, channelCount: 1 },
    });
  } catch (error) {
    const why = {
      NotAllowedError: "the browser did not allow the microphone; allow it for this page",
      NotFoundError: "there is no microphone",
      NotReadableError: "the microphone is in use elsewhere",
    };
    const instead = lines.are ? "a recording or the lines below" : "a recording";
    throw new Error(`${why[error.name] ?? error.message}, or call from ${instead}`);
  }
}

async function open(made) {
  const { context } = made;
  made.recorder = context;
  if ($("source").value === "microphone") {
    made.stream = await microphone();
    // At the device's own rate: Firefox gives a microphone at no other.
    made.recorder = new AudioContext();
    made.source = made.recorder.createMediaStreamSource(made.stream);
  } else if ($("source").value === "lines") {
    made.isSilent = true;
    made.source = new ConstantSourceNode(context, { offset: 0 });
  } else {
    const [file] = $("recording").files;
    if (!file) throw new Error("choose a recording first");
    const buffer = await context.decodeAudioData(await file.arrayBuffer()).catch(() => {
      throw new Error(`${file.name} is no recording that this browser can read`);
    });
    made.source = new AudioBufferSourceNode(context, { buffer });
  }
}

function url(path, query = {}) {
  const to = new URL(path, address);
  to.search = "";
  for (const [name, value] of Object.entries(query)) to.searchParams.set(name, value);
  if ($("token").value) to.searchParams.set("token", $("token").value);
  return to;
}

async function begin() {
  say("Connecting …");
  $("words").replaceChildren();
  const made = {};
  try {
    if (!globalThis.AudioWorkletNode) {
      throw new Error("this browser plays no calls (AudioWorklet): it must be a recent one, and the page come by https or from this machine");
    }
    made.context = new AudioContext({ sampleRate: 24000 });
    await open(made);
    await request("metrics");
    lines.load();
    const to = url("api/chat", { format: "pcm" });
    to.protocol = to.protocol.replace("http", "ws");
    call = new Call(made, new WebSocket(to));
    $("call").textContent = "Hang up";
  } catch (error) {
    release(made);
    say(sentence("No call", error.message || error.name), true);
  }
}

// What the server's voice can say in the user's place: nothing, if it has none.
const lines = {
  are: false,

  async load() {
    if (this.are || !$("token-label").hidden && !$("token").value) return;
    // A page can do without; a server that does not answer is told of when a call begins.
    const found = await request("api/lines").then((answer) => answer.json()).catch(() => []);
    this.are = found.length > 0;
    $("lines-part").hidden = $("source-lines").hidden = $("source-lines").disabled = !this.are;
    $("lines").replaceChildren(...found.map(({ kind, text }, index) => {
      const button = document.createElement("button");
      button.textContent = text;
      button.className = kind;
      button.disabled = !call?.capture;
      button.onclick = saying(() => this.speak(index, text));
      return button;
    }));
  },

  async speak(index, text) {
    const speaker = call;
    this.allow(false);
    try {
      const answer = await request(`api/lines/${index}`);
      await speaker.sayLine(text, await answer.arrayBuffer());
    } finally {
      this.allow(call === speaker);
    }
  },

  allow(may) {
    for (const button of $("lines").children) button.disabled = !may;
  },
};
lines.load();

$("call").onclick = async () => {
  if (call) return call.socket.close(1000);
  // A second click would open a second microphone, which nothing closes.
  $("call").disabled = true;
  try {
    await begin();
  } finally {
    $("call").disabled = false;
  }
};
$("source").onchange = () => ($("recording-label").hidden = $("source").value !== "file");
$("forget").onclick = () => call?.ask({ do: "forget" });
$("ttt").onchange = () => call?.ask({ do: "ttt", on: $("ttt").checked });

function offer(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const session = () => `api/calls/${call.about.call}/session`;
$("save").onclick = saying(async () => {
  const part = $("part").value;
  const answer = await request(session(), { part });
  const content = await answer.blob().catch(() => {
    throw new Error("The session did not come whole: the connection was lost.");
  });
  // A memory must not take the place of all in the folder of downloads.
  offer(content, part === "memory" ? "moshi-memory.session" : "moshi.session");
  say(`The session is saved (${part}).`);
});
$("load").onclick = () => $("session").click();
$("session").onchange = saying(async () => {
  const [file] = $("session").files;
  if (!file || !call) return;
  try {
    const answer = await request(session(), {}, { method: "PUT", body: file });
    say(`The session goes on (${(await answer.text()).trim()}).`);
  } finally {
    $("session").value = "";
  }
});
$("download").onclick = saying(() => offer(stereo(last), "call.wav"));

// Left Moshi, right the user, as recordings for training are.
function stereo({ heard, said, frames, about }) {
  const samples = said.length * about.frame_samples;
  const bytes = new DataView(new ArrayBuffer(44 + 4 * samples));
  const text = (at, word) => [...word].forEach((c, i) => bytes.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  bytes.setUint32(4, 36 + 4 * samples, true);
  text(8, "WAVEfmt ");
  [16, 1 | (2 << 16), about.rate_hz, 4 * about.rate_hz, 4 | (16 << 16)].forEach((value, i) =>
    bytes.setUint32(16 + 4 * i, value, true),
  );
  text(36, "data");
  bytes.setUint32(40, 4 * samples, true);
  said.forEach((frame, index) => {
    for (let i = 0; i < frame.length; i++) {
      const at = 44 + 4 * (index * about.frame_samples + i);
      bytes.setInt16(at, frame[i], true);
      bytes.setInt16(at + 2, heard[frames[index]]?.[i] ?? 0, true);
    }
  });
  return new Blob([bytes], { type: "audio/wav" });
}
