// Runs in the browser's audio thread: microphone to frames, frames to loudspeaker.

const RATE = 24000;
const FRAME = 1920;

// A windowed sinc, looked up in a table.
class Resampler {
  constructor(from, to) {
    this.step = from / to;
    const cutoff = 0.95 * Math.min(1, to / from);
    this.half = Math.ceil(16 / cutoff);
    this.fine = 256;
    this.table = new Float32Array(this.half * this.fine + 2);
    for (let i = 0; i < this.table.length; i++) {
      const t = i / this.fine;
      const x = Math.PI * cutoff * t;
      const sinc = t === 0 ? 1 : Math.sin(x) / x;
      const window = t >= this.half ? 0 : 0.5 + 0.5 * Math.cos((Math.PI * t) / this.half);
      this.table[i] = cutoff * sinc * window;
    }
    this.input = new Float32Array(this.half); // silence before the first sample
    this.place = this.half; // of the next output, in `input`
  }

  push(samples) {
    const joined = new Float32Array(this.input.length + samples.length);
    joined.set(this.input);
    joined.set(samples, this.input.length);
    const out = [];
    while (this.place + this.half < joined.length) {
      const first = Math.ceil(this.place - this.half);
      let sum = 0;
      for (let k = Math.max(0, first); k <= this.place + this.half; k++) {
        sum += joined[k] * this.table[Math.round(Math.abs(k - this.place) * this.fine)];
      }
      out.push(sum);
      this.place += this.step;
    }
    const done = Math.max(0, Math.floor(this.place) - this.half);
    this.input = joined.slice(done);
    this.place -= done;
    return out;
  }
}

class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = sampleRate === RATE ? null : new Resampler(sampleRate, RATE);
    this.frame = new Int16Array(FRAME);
    this.filled = 0;
  }

  process(inputs) {
    const heard = inputs[0][0];
    if (heard === undefined) return true;
    for (const sample of this.resampler === null ? heard : this.resampler.push(heard)) {
      this.frame[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.filled === FRAME) {
        this.port.postMessage(this.frame);
        this.filled = 0;
      }
    }
    return true;
  }
}

class Loudspeaker extends AudioWorkletProcessor {
  constructor() {
    super();
    this.waiting = [];
    this.place = 0; // in the first that waits
    this.count = 0;
    this.playing = false;
    this.port.onmessage = ({ data }) => {
      this.waiting.push(data);
      this.count += data.length;
      // The network was away: what is older than a second is not worth a delay.
      while (this.count > RATE) this.drop();
    };
  }

  drop() {
    this.count -= this.waiting.shift().length - this.place;
    this.place = 0;
  }

  process(inputs, outputs) {
    const out = outputs[0][0];
    // Two frames in hand, so that a late one is not heard as a gap.
    if (!this.playing) this.playing = this.count >= 2 * FRAME;
    for (let i = 0; this.playing && i < out.length; i++) {
      if (this.count === 0) {
        this.playing = false;
        break;
      }
      out[i] = this.waiting[0][this.place++];
      this.count--;
      if (this.place === this.waiting[0].length) {
        this.waiting.shift();
        this.place = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
registerProcessor("loudspeaker", Loudspeaker);
