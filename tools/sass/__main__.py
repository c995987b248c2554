import sys

from tools.sass.report import main

sys.exit(main())
