"""Headless Chromium as the window of a phone or a desk, through its debugging pipe (Chrome DevTools Protocol)."""

import fcntl
import json
import os
import subprocess


class Browser:
    """A window of that many pixels; `with Browser(360, 740) as browser`."""

    def __init__(self, width, height, scale=2):
        self.size, self.count, self.rest, self.complaints = (width, height, scale), 0, b"", []

    def __enter__(self):
        (theirs_in, self.to), (self.of, theirs_out) = os.pipe(), os.pipe()
        # the browser reads 3 and writes 4, which may be other files here
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=lambda: [os.dup2(fd, 3 + n) for n, fd in enumerate(high)], pass_fds=(3, 4),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self.session = None
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        width, height, scale = self.size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=True)
        self.call("Runtime.enable")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.of)

    def call(self, method, **params):
        """One command and its result; what the page complains of meanwhile is kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(answer["params"]["exceptionDetails"])
            if answer.get("id") == self.count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def receive(self):
        while b"\0" not in self.rest:
            read = os.read(self.of, 1 << 16)
            assert read, "the browser has ended"
            self.rest += read
        line, self.rest = self.rest.split(b"\0", 1)
        return json.loads(line)

    def open(self, url):
        self.call("Page.navigate", url=url)

    def evaluate(self, expression):
        """Value of an expression of JavaScript in the page; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")
