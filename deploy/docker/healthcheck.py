"""Whether the service in this container is well: asks its /healthz; exit status 0 or 1."""

import os
import sys
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

direct = build_opener(ProxyHandler({}))  # whatever proxy Docker tells its containers of
try:
    direct.open(f"http://127.0.0.1:{os.environ.get('SEEDRL_HTTP_PORT', '8080')}/healthz", timeout=5)
except (URLError, OSError) as error:
    sys.exit(f"not healthy: {error}")
