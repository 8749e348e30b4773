"""The small world of the nano model: every word it can see, hear or answer, and how a sample's random state is made.

Everything that a person would want to know about "what is in the data" is a constant of this file.
"""

import random
from zlib import crc32

SPLITS = ("train", "heldout")

# Linear placement in this order is also the class id order of the dense labels.
COLOURS = {
    "red": (214, 36, 36),
    "orange": (245, 140, 20),
    "yellow": (245, 222, 40),
    "green": (36, 160, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "white": (250, 250, 250),
    "black": (14, 14, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)  # row-major
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (dx, dy), y grows downwards
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMAND_WORDS = (
    "yes", "no", "up", "down", "left", "right", "stop", "go", "on", "off",
    "red", "green", "blue", "yellow", "white", "black", "circle", "square", "star", "hello",
)  # fmt: skip
SPOKEN_WORDS = DIGIT_WORDS + COMMAND_WORDS

# Words shown in pictures. The two lists share nothing; random strings of letters are used beside them.
PRINTED_WORDS = {
    "train": (
        "ACE ACT ADD AGE AIR ALL AND ANT APPLE ARM ART ASK BACK BAG BALL BAND BANK BAR BED BEE BELL BIG BIKE BIRD BLUE "
        "BOAT BOOK BOX BOY BREAD BUS BUY CAB CAKE CALL CAR CARD CAT CHAIR CITY CLOCK COAT COLD COOK COW CUP DARK DAY "
        "DESK DOG DOOR DOWN DRAW DUCK EAR EAST EAT EGG END EXIT EYE FACE FALL FAN FARM FAST FISH FIVE FLAG FLY FOG "
        "FOOD FOOT FORK FOUR FOX FROG FUN GAME GIFT GIRL GLASS GO GOLD GOOD GRASS GREEN HAND HAT HEAD HELP HEN HOME "
        "HORSE HOT HOUR ICE IN INK IRON JAM JET JOB JOY JUMP KEY KING KITE LAMP LAND LEFT LEG LEMON LIFE LINE LION "
        "LOCK LONG LUCK MAIN MAP MARCH MARK MEN MILK MIX MOON MOUSE NAME NEW NIGHT NO NORTH NOSE NUT OAK OFF OIL OLD "
        "ONE OPEN OVEN PACK PAGE PAN PARK PAY PEN PIG PLAN PLAY POT PUSH QUEEN QUIZ RADIO RAIN RED RICE RING ROAD ROCK "
        "ROOM ROSE RUN SALE SALT SAND SEA SHIP SHOE SHOP SIGN SIX SKY SLOW SNOW SOAP SONG SOUP SPOON STAR STOP SUN "
        "TABLE TAXI TEA TEN TIME TOP TOY TRAIN TREE TRUCK TWO UP URN VAN VASE VOTE WALK WALL WATER WAX WE WEST WIND "
        "WOLF WOOD YARD YES ZERO ZONE ZOO"
    ).split(),
    "heldout": (
        "AXE BAKE BEACH BEAR BELT BOWL BRICK CAMP CLOUD CORN CROW DANCE DEER DUST ELK FENCE FIRE FUEL GATE GOAT GRAPE "
        "HELLO HILL HOOK INN JAR JUDGE JUICE KNEE LAKE LEAF LIME MAZE MEAL MUD NEST NINE OCEAN OMNI OX PEACH PIANO "
        "POND PUMP QUAY QUICK RIGHT RIVER ROPE SEED SEVEN SMILE SOCK STONE SUGAR TENT TIGER TO VINE VOICE WAGON "
        "WEB WORLD YAK ZEBRA"
    ).split(),
}


def sample_random(skill: str, seed: int, split: str) -> random.Random:
    """The random state of one sample; the same on every machine and Python version."""
    if split not in SPLITS:
        raise ValueError(f"split is one of {SPLITS}, not {split!r}")
    return random.Random(f"{skill}/{split}/{seed}")


def in_split(content: str, split: str) -> bool:
    """Whether a piece of content (a scene, a sum, a string) belongs to `split`: one in eight contents is held out."""
    return (crc32(content.encode()) % 8 == 0) == (split == "heldout")
