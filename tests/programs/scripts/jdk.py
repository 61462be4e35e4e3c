"""The JDK's HttpClient, below LangChain4j, Spring and Ktor."""

import subprocess
import sys
from pathlib import Path

sys.exit(subprocess.run(["java", str(Path(__file__).with_name("Client.java"))], check=False).returncode)
