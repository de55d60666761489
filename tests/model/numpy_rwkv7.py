"""RWKV-7 once more, in numpy and float64, one token at a time, from the names in a state dict alone."""

import numpy as np


class NumpyRwkv7:
    """`step(token)` returns logits `[V]`; `wkv[layer]` is `[H,V,K]`, the shifts are `[C]`."""

    def __init__(self, state_dict, head_size: int):
        self.z = {name: t.double().numpy() for name, t in state_dict.items()}
        self.N = head_size
        self.n_layer = 1 + max(int(name.split(".")[1]) for name in self.z if name.startswith("blocks."))
        C = self.z["emb.weight"].shape[1]
        shape = (len(self.z["blocks.0.att.key.weight"]) // head_size, head_size, head_size)
        self.wkv = [self.z.get(f"blocks.{i}.att.time_state", np.zeros(shape)).copy() for i in range(self.n_layer)]
        self.att_shift = [np.zeros(C) for _ in range(self.n_layer)]
        self.ffn_shift = [np.zeros(C) for _ in range(self.n_layer)]

    def step(self, token: int) -> np.ndarray:
        z = self.z
        x = self._norm(z["emb.weight"][token], "blocks.0.ln0")
        v_first = None
        for i in range(self.n_layer):
            h = self._norm(x, f"blocks.{i}.ln1")
            y, v_first = self._time_mix(i, h, v_first)
            x = x + y
            h = self._norm(x, f"blocks.{i}.ln2")
            mixed = h + (self.ffn_shift[i] - h) * z[f"blocks.{i}.ffn.x_k"].ravel()
            self.ffn_shift[i] = h
            k = np.maximum(z[f"blocks.{i}.ffn.key.weight"] @ mixed, 0) ** 2
            x = x + z[f"blocks.{i}.ffn.value.weight"] @ k
        return z["head.weight"] @ self._norm(x, "ln_out")

    def _time_mix(self, i, x, v_first):
        p = {name.split("att.")[1]: t for name, t in self.z.items() if name.startswith(f"blocks.{i}.att.")}
        p |= {name: t.ravel() for name, t in p.items() if t.ndim == 3 and name != "time_state"}
        sigmoid = lambda u: 1 / (1 + np.exp(-u))  # noqa: E731
        mixed = {c: x + (self.att_shift[i] - x) * p[f"x_{c}"] for c in "rwkvag"}
        self.att_shift[i] = x
        r, k, v = p["receptance.weight"] @ mixed["r"], p["key.weight"] @ mixed["k"], p["value.weight"] @ mixed["v"]
        decay = np.exp(-np.exp(-0.5) * sigmoid(p["w0"] + np.tanh(mixed["w"] @ p["w1"]) @ p["w2"]))
        a = sigmoid(p["a0"] + mixed["a"] @ p["a1"] @ p["a2"])
        gate = sigmoid(mixed["g"] @ p["g1"]) @ p["g2"]
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * sigmoid(p["v0"] + mixed["v"] @ p["v1"] @ p["v2"])
        kk = k * p["k_k"]
        k = k * (1 + (a - 1) * p["k_a"])
        y = np.empty_like(v)
        for h in range(len(v) // self.N):
            at = slice(h * self.N, (h + 1) * self.N)
            unit = kk[at] / np.linalg.norm(kk[at])
            S = self.wkv[i][h]
            S = S * decay[at] + np.outer(S @ -unit, unit * a[at]) + np.outer(v[at], k[at])
            self.wkv[i][h] = S
            out = S @ r[at]
            out = (out - out.mean()) / np.sqrt(out.var() + 64e-5)
            y[at] = out * p["ln_x.weight"][at] + p["ln_x.bias"][at]
            y[at] += (r[at] * k[at] * p["r_k"].reshape(-1, self.N)[h]).sum() * v[at]
        return p["output.weight"] @ (y * gate), v_first

    def _norm(self, x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * self.z[f"{name}.weight"] + self.z[f"{name}.bias"]
