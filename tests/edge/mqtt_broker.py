"""A broker in a process of its own: `mqtt_broker.py PORT [USER PASSWORD [CERTIFICATE KEY]]`; prints what it takes."""

import asyncio
import json
import sys

if __name__ == "__main__":  # whoever only imports this, to look for doctests, needs no amqtt
    from amqtt.broker import Broker
    from amqtt.plugins.base import BaseAuthPlugin, BasePlugin

    PORT, USER, PASSWORD, CERTIFICATE, KEY = (sys.argv[1:] + [""] * 4)[:5]

    class Gate(BaseAuthPlugin):
        async def authenticate(self, *, session):
            return not USER or (session.username, session.password) == (USER, PASSWORD)

    class Printer(BasePlugin):
        async def on_broker_message_received(self, *, client_id, message):
            print(json.dumps([message.topic, message.qos, bytes(message.data).decode()]), flush=True)

    async def serve():
        listener = {"type": "tcp", "bind": f"127.0.0.1:{PORT}"}
        if CERTIFICATE:
            listener |= {"ssl": True, "certfile": CERTIFICATE, "keyfile": KEY}
        plugins = {f"{__name__}.{plugin}": {} for plugin in ("Gate", "Printer")}
        await Broker({"listeners": {"default": listener}, "plugins": plugins}).start()
        print("ready", flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())
