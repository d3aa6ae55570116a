"""A headless Chromium for tests of pages, over its DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from tornado.websocket import websocket_connect

FOUND = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)


class Browser:
    """One page in a browser of its own; to be used in a ``with`` statement.

    Attributes:
        requests: addresses that the page asked for.
        problems: what scripts threw.
    """

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [
            FOUND,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
        ]
        command += ["--disable-dev-shm-usage", "--no-first-run", "--remote-allow-origins=*"]
        command += [f"--user-data-dir={self.folder.name}", "about:blank"]
        self.log = open(Path(self.folder.name) / "log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.loop = asyncio.new_event_loop()
        self.number, self.requests, self.problems = 0, [], []
        self.loop.run_until_complete(self._connect())
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self.socket.close()
        self.loop.close()
        self.process.terminate()
        self.process.wait(20)
        self.log.close()
        self.folder.cleanup()

    async def _connect(self):
        told = Path(self.folder.name) / "DevToolsActivePort"
        for _ in range(600):
            if told.is_file() and len(told.read_text().split()) == 2:
                break
            await asyncio.sleep(0.1)
        port, path = told.read_text().split()
        self.socket = await websocket_connect(
            f"ws://127.0.0.1:{port}{path}", max_message_size=2**28
        )
        self.session = None
        (page,) = [
            target
            for target in (await self._call("Target.getTargets"))["targetInfos"]
            if target["type"] == "page"
        ]
        how = {"targetId": page["targetId"], "flatten": True}
        self.session = (await self._call("Target.attachToTarget", **how))["sessionId"]

    async def _call(self, method, **parameters):
        self.number += 1
        asked = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            asked["sessionId"] = self.session
        await self.socket.write_message(json.dumps(asked))
        while True:
            told = json.loads(await asyncio.wait_for(self.socket.read_message(), 60))
            if told.get("method") == "Network.requestWillBeSent":
                self.requests.append(told["params"]["request"]["url"])
            if told.get("method") == "Runtime.exceptionThrown":
                self.problems.append(told["params"]["exceptionDetails"])
            if told.get("id") == self.number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]

    def call(self, method, **parameters):
        """What a method of the protocol returns."""
        return self.loop.run_until_complete(self._call(method, **parameters))

    def run(self, script):
        """The value of an expression on the page, waited for if it is a promise."""
        how = {"expression": script, "awaitPromise": True, "returnByValue": True}
        found = self.call("Runtime.evaluate", **how)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def wait(self, script, seconds=30):
        """Wait until an expression is true."""
        for _ in range(int(seconds * 20)):
            if self.run(script):
                return
            self.loop.run_until_complete(asyncio.sleep(0.05))
        raise TimeoutError(script)

    def open(self, path, width=1280, height=1000, scripts=True):
        """Open a file in a window of this size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=Path(path).as_uri())
        self.wait("document.readyState === 'complete'")

    def press(self, key):
        """Press and release a key, named as in ``KeyboardEvent.key``."""
        code = {"ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36, "Tab": 9, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            how = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code[key]}
            self.call("Input.dispatchKeyEvent", **how)

    def picture(self, path):
        """Save the whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(found["data"]))
