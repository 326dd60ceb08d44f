"""Product manuals: what the guide of every kind says; [] is the fact, three values for the three products of a kind."""
# ruff: noqa: E501  (template text: one entry per line reads better)

from __future__ import annotations

Fact = tuple[str, tuple[str, str, str], str]

# kind: (opening of the guide, facts as (sentence, values, question))
MANUALS: dict[str, tuple[str, tuple[Fact, ...]]] = {
    "kettle": (
        "Thank you for choosing the <product>. Rinse it twice with fresh water before the first cup.",
        (
            ("Filled to the line it holds [] of water.", ("1.2 litres", "1.5 litres", "1.8 litres"), "How much water does the <product> hold?"),
            ("A full load boils in about [].", ("3 minutes", "4 minutes", "5 minutes"), "How long does a full <product> take to boil?"),
            ("To keep tea water hot, hold the [] until the ring glows orange; it then keeps the temperature for a while.", ("Keep button", "Stay button", "Hold button"), "Which button keeps the water hot in the <product>?"),
            ("Descale it every [] with the sachet from the box, more often if your water is hard.", ("six weeks", "two months", "ten weeks"), "How often should the <product> be descaled?"),
            ("If the display shows [], it was switched on without water: let it cool before you fill it.", ("E3", "E7", "H2"), "Which code does the <product> show when it is switched on empty?"),
            ("The cable under the base can be unrolled to [].", ("70 cm", "85 cm", "110 cm"), "How long is the cable of the <product>?"),
            ("Spare lids are sold under part number [].", ("KL-104", "KL-220", "KL-318"), "What is the part number of a spare lid for the <product>?"),
        ),
    ),
    "toaster": (
        "The <product> browns two slices at a time. Run it once without bread, with a window open, to burn off dust.",
        (
            ("The dial has [], and the middle one suits most sandwich bread.", ("six steps", "seven steps", "nine steps"), "How many steps does the dial of the <product> have?"),
            ("For frozen bread press the [] after you lower the lever.", ("Snow key", "Frost key", "Ice key"), "Which key do I press for frozen bread on the <product>?"),
            ("Empty the crumb tray after every [] at the latest.", ("20 slices", "35 slices", "50 slices"), "After how many slices should the crumb tray of the <product> be emptied?"),
            ("Slices may be up to [] thick.", ("24 mm", "28 mm", "36 mm"), "How thick may a slice be for the <product>?"),
            ("A jammed lever releases when you hold Stop for [].", ("four seconds", "six seconds", "eight seconds"), "How long must Stop be held to free a jammed lever on the <product>?"),
            ("Leave at least [] between the appliance and the wall.", ("10 cm", "15 cm", "20 cm"), "How far from the wall must the <product> stand?"),
            ("The matching bun rack is order number [].", ("TR-51", "TR-66", "TR-72"), "Under which number can I order the bun rack of the <product>?"),
        ),
    ),
    "desk lamp": (
        "The <product> stands on any level desk. Remove the film from the shade before you plug it in.",
        (
            ("Touch the foot once for light, twice for [].", ("reading light", "evening light", "focus light"), "What do I get when I touch the foot of the <product> twice?"),
            ("At full brightness the panel draws [].", ("6 watts", "9 watts", "11 watts"), "How many watts does the <product> draw at full brightness?"),
            ("It switches itself off after [] unless you touch it again.", ("90 minutes", "two hours", "four hours"), "When does the <product> switch itself off?"),
            ("The arm can be tightened with the [] key clipped under the foot.", ("3 mm", "4 mm", "5 mm"), "Which size of key tightens the arm of the <product>?"),
            ("The panel is rated for [] of use and cannot be exchanged at home.", ("20,000 hours", "25,000 hours", "40,000 hours"), "For how many hours of use is the panel of the <product> rated?"),
            ("A socket at the back charges phones with up to [].", ("5 volts", "9 volts", "12 volts"), "With how many volts can the <product> charge a phone?"),
            ("If it flickers, the cause is nearly always [].", ("an old dimmer", "a loose plug", "a dusty sensor"), "What is nearly always the cause when the <product> flickers?"),
        ),
    ),
    "robot vacuum": (
        "The <product> cleans while you are out. Put the dock against a wall, on a hard floor, with free space on both sides.",
        (
            ("One charge lasts for about [] on hard floors.", ("75 minutes", "100 minutes", "140 minutes"), "How long does one charge of the <product> last?"),
            ("The dust box takes [] and should be emptied after every tour.", ("0.3 litres", "0.4 litres", "0.6 litres"), "How much dust fits into the box of the <product>?"),
            ("It climbs door sills of up to [].", ("15 mm", "18 mm", "22 mm"), "How high a door sill can the <product> climb?"),
            ("To lock a room, open the map and draw a [].", ("red line", "blue square", "yellow fence"), "What do I draw on the map to keep the <product> out of a room?"),
            ("Replace the side brush every [].", ("three months", "five months", "eight months"), "How often should the side brush of the <product> be replaced?"),
            ("Three short beeps mean that [].", ("a wheel is stuck", "the filter is wet", "the dock is blocked"), "What do three short beeps of the <product> mean?"),
            ("To forget your Wi-Fi, hold Home and Spot together for [].", ("five seconds", "seven seconds", "twelve seconds"), "How long do I hold Home and Spot to reset the Wi-Fi of the <product>?"),
        ),
    ),
    "air purifier": (
        "The <product> pulls room air through a washable net and a fine filter. Keep curtains away from its intake.",
        (
            ("It is made for rooms of up to [].", ("22 square metres", "35 square metres", "48 square metres"), "For how large a room is the <product> made?"),
            ("The fine filter lasts [] in an ordinary flat.", ("six months", "nine months", "one year"), "How long does the fine filter of the <product> last?"),
            ("After a change of filter, press [] for three seconds so that the counter starts again.", ("Leaf", "Drop", "Cloud"), "Which key resets the filter counter of the <product>?"),
            ("In night mode it makes no more noise than [].", ("19 decibels", "23 decibels", "26 decibels"), "How loud is the <product> in night mode?"),
            ("A purple ring means []; open a window for a few minutes.", ("cooking fumes", "high pollen", "paint vapour"), "What does a purple ring on the <product> mean?"),
            ("Wash the net every [] under lukewarm water.", ("two weeks", "three weeks", "four weeks"), "How often is the net of the <product> washed?"),
            ("The sensor window is cleaned with [], never with spray.", ("a dry cotton bud", "a soft brush", "a lens cloth"), "What is used to clean the sensor window of the <product>?"),
        ),
    ),
    "speaker": (
        "The <product> plays from your phone, from the radio and from a cable. Charge it fully before the first evening.",
        (
            ("The battery plays for [] at medium volume.", ("9 hours", "14 hours", "20 hours"), "How long does the battery of the <product> play?"),
            ("For pairing hold the [] until you hear a chime.", ("top ring", "wave button", "side strap"), "What do I hold to pair the <product>?"),
            ("Two of them make a stereo pair when they are at most [] apart.", ("4 metres", "6 metres", "8 metres"), "How far apart may two <product>s be as a stereo pair?"),
            ("It may be splashed, for it meets class [], but it must not be put into water.", ("IPX4", "IPX5", "IP54"), "Which protection class does the <product> meet?"),
            ("It remembers up to [].", ("five phones", "eight phones", "ten phones"), "How many phones does the <product> remember?"),
            ("The radio finds stations again when you press Plus and Minus for [].", ("two seconds", "three seconds", "nine seconds"), "How long are Plus and Minus pressed to search stations on the <product>?"),
            ("Without sound it goes to sleep after [].", ("10 minutes", "15 minutes", "25 minutes"), "After what time without sound does the <product> go to sleep?"),
        ),
    ),
    "coffee grinder": (
        "The <product> grinds for filter, press and espresso. Never run it with the bean lid open.",
        (
            ("The bean hopper takes [].", ("160 grams", "220 grams", "300 grams"), "How many grams of beans fit into the hopper of the <product>?"),
            ("For espresso set the collar to [].", ("mark 4", "mark 7", "mark 9"), "To which mark is the collar of the <product> set for espresso?"),
            ("The grinding set is made of [].", ("hardened steel", "ceramic", "coated titanium"), "What is the grinding set of the <product> made of?"),
            ("Let the motor rest for [] after two full loads.", ("5 minutes", "8 minutes", "12 minutes"), "How long should the motor of the <product> rest after two loads?"),
            ("Clean the set once [] with the brush from the lid.", ("a week", "a fortnight", "a month"), "How often is the grinding set of the <product> cleaned?"),
            ("If it hums without turning, [] has usually got between the discs.", ("a small stone", "an oily bean", "a bit of husk"), "What has usually got between the discs when the <product> hums without turning?"),
            ("Fresh discs are part number [].", ("GD-12", "GD-17", "GD-25"), "What is the part number of fresh discs for the <product>?"),
        ),
    ),
    "electric blanket": (
        "The <product> lies under the sheet, cable to the foot of the bed. Do not fold it while it is warm.",
        (
            ("It has [] of heat, shown by small lamps.", ("three levels", "four levels", "six levels"), "How many levels of heat does the <product> have?"),
            ("It switches off by itself after [].", ("three hours", "eight hours", "ten hours"), "After how long does the <product> switch off by itself?"),
            ("Wash it at no more than [], without softener.", ("30 degrees", "40 degrees", "60 degrees"), "At what temperature may the <product> be washed?"),
            ("Before washing, pull off the [] plug at the corner.", ("grey", "green", "white"), "What colour is the plug that is pulled off before washing the <product>?"),
            ("It warms up within [] on the highest level.", ("6 minutes", "10 minutes", "18 minutes"), "How quickly does the <product> warm up?"),
            ("It measures [].", ("150 by 80 cm", "160 by 140 cm", "190 by 90 cm"), "What size is the <product>?"),
            ("It is not meant for children under [], nor for pets.", ("three", "five", "eight"), "Under what age should children not use the <product>?"),
        ),
    ),
    "bathroom scale": (
        "The <product> needs a hard, level floor. Step on once and off again so that it can find its zero.",
        (
            ("It carries up to [].", ("150 kg", "180 kg", "200 kg"), "What weight can the <product> carry?"),
            ("It runs on [], which are in the box.", ("two AA cells", "three AAA cells", "four AA cells"), "Which batteries does the <product> use?"),
            ("It keeps the readings of [] apart.", ("four people", "six people", "twelve people"), "The readings of how many people does the <product> keep apart?"),
            ("Readings are rounded to [].", ("50 grams", "100 grams", "200 grams"), "To how many grams does the <product> round?"),
            ("To change from kilos to stones press the [] underneath.", ("small lever", "round key", "square key"), "What is pressed to change the <product> from kilos to stones?"),
            ("When it shows [], both feet were not on the plate.", ("FEET", "Err2", "C"), "What does the <product> show if both feet were not on the plate?"),
            ("Data goes to the app when you stand still for [].", ("three seconds", "five seconds", "ten seconds"), "How long must I stand still on the <product> to send data to the app?"),
        ),
    ),
    "fan heater": (
        "The <product> warms a small room quickly. Keep a metre free in front of the grille and never cover it.",
        (
            ("Its strongest setting uses [].", ("1,500 watts", "1,800 watts", "2,200 watts"), "What is the power of the strongest setting of the <product>?"),
            ("Tipped over, it cuts out within [].", ("half a second", "one second", "two seconds"), "How fast does a toppled <product> turn itself off?"),
            ("The frost guard starts the fan below [].", ("4 degrees", "6 degrees", "8 degrees"), "Below which temperature does the frost guard of the <product> kick in?"),
            ("Dust the grille every [] with the nozzle of a vacuum cleaner.", ("fortnight", "month", "season"), "At what interval does the grille of the <product> need dusting?"),
            ("The timer can be set for up to [].", ("6 hours", "9 hours", "12 hours"), "What is the longest time the timer of the <product> allows?"),
            ("The remote control is tucked into [].", ("the rear pocket", "the base drawer", "the carry handle"), "Where is the remote of the <product> kept?"),
            ("A blinking snowflake asks you to [].", ("clean the intake", "lower the target", "call the workshop"), "What should one do if a snowflake blinks on the <product>?"),
        ),
    ),
    "doorbell camera": (
        "The <product> shows who is at the door, by day and by night. Mount it at chest height with the two screws supplied.",
        (
            ("It sees an angle of [] in front of the door.", ("120 degrees", "140 degrees", "165 degrees"), "How wide is the view of the <product>?"),
            ("Clips are kept for [] and then erased.", ("48 hours", "seven days", "30 days"), "For what period does the <product> store clips?"),
            ("The battery needs charging about every [].", ("two months", "four months", "six months"), "Roughly how often must the battery of the <product> be recharged?"),
            ("To join the Wi-Fi, hold its [] up to the code on your phone.", ("lens", "back plate", "bell face"), "Which part of the <product> is shown the code on the phone?"),
            ("A stranger who lingers for more than [] sets off an alert.", ("10 seconds", "20 seconds", "45 seconds"), "How long can somebody linger before the <product> sends an alert?"),
            ("The indoor chime offers [].", ("six melodies", "nine melodies", "sixteen melodies"), "How many tunes has the chime of the <product>?"),
            ("It works in frost down to [].", ("minus 10 degrees", "minus 15 degrees", "minus 25 degrees"), "Down to what temperature can the <product> be used?"),
        ),
    ),
    "humidifier": (
        "The <product> gives off a fine mist. Use cold tap water, and place it on a shelf rather than on the carpet.",
        (
            ("The tank takes [].", ("2.5 litres", "3.8 litres", "5 litres"), "What is the capacity of the tank of the <product>?"),
            ("At the gentlest setting it runs for [] without a refill.", ("14 hours", "22 hours", "36 hours"), "How many hours can the <product> go before a refill at the gentlest setting?"),
            ("Wipe the plate every [] with vinegar.", ("three days", "five days", "ten days"), "How frequently is the plate of the <product> wiped with vinegar?"),
            ("Scented drops belong in the [] only.", ("side tray", "rear slot", "lid cup"), "Where may scented drops be put in the <product>?"),
            ("It stops on its own when the air reaches [].", ("50 percent", "55 percent", "65 percent"), "At what level of humidity does the <product> stop?"),
            ("A red drop means [].", ("the tank is empty", "the float is stuck", "the plate is chalky"), "What is the meaning of a red drop on the <product>?"),
            ("The lime cartridge is sold as [].", ("HC-30", "HC-44", "HC-58"), "What is the lime cartridge of the <product> called in the shop?"),
        ),
    ),
    "rice cooker": (
        "The <product> cooks, steams and keeps food warm. Wash the bowl by hand and dry its underside before use.",
        (
            ("The bowl makes up to [] of cooked rice.", ("4 cups", "6 cups", "10 cups"), "How much cooked rice does the <product> make?"),
            ("White rice is ready after [].", ("22 minutes", "28 minutes", "33 minutes"), "What time does white rice need in the <product>?"),
            ("It holds food warm for at most [].", ("5 hours", "12 hours", "24 hours"), "For what maximum time does the <product> keep food warm?"),
            ("For brown rice turn the knob to [].", ("Grain", "Earth", "Slow"), "Which setting of the <product> is meant for brown rice?"),
            ("The steam valve is rinsed after every [].", ("second use", "third use", "fifth use"), "After which use should the steam valve of the <product> be rinsed?"),
            ("The delayed start reaches up to [] ahead.", ("8 hours", "13 hours", "18 hours"), "How far ahead can the start of the <product> be delayed?"),
            ("The bowl is coated with [], so use no metal spoon.", ("ceramic glaze", "honeycomb enamel", "diamond dust"), "What is the coating of the bowl of the <product>?"),
        ),
    ),
    "stand mixer": (
        "The <product> kneads, beats and whisks. Lock the head with the side bolt before you turn it on.",
        (
            ("The bowl has room for [] of dough.", ("1.5 kg", "2 kg", "2.8 kg"), "What amount of dough fits into the <product>?"),
            ("Yeast dough is kneaded at speed [] and no faster.", ("2", "3", "4"), "At which speed is yeast dough kneaded in the <product>?"),
            ("After [] of kneading, give the motor a break.", ("7 minutes", "11 minutes", "16 minutes"), "When does the motor of the <product> need a break from kneading?"),
            ("The head is freed by the [] on the neck.", ("brass bolt", "thumb wheel", "black lever"), "With what is the head of the <product> freed?"),
            ("Of the tools in the box only the [] may go into the dishwasher.", ("dough hook", "flat beater", "splash guard"), "Which tool of the <product> is safe in the dishwasher?"),
            ("If the overload lamp lights, pull the plug and wait [].", ("15 minutes", "30 minutes", "45 minutes"), "What wait is needed once the overload lamp of the <product> lights?"),
            ("The joint is greased every [] by our workshop.", ("two years", "three years", "five years"), "At what interval does the workshop grease the joint of the <product>?"),
        ),
    ),
}
ENDINGS = (
    "Keep this guide, it is also in the app under Guides. For anything else our help desk is there on working days.",
    "Old appliances do not belong in the household waste: every Brindlewick store takes them back free of charge.",
    "Pull the plug before you clean it, and use a soft damp cloth, never a scouring pad or a solvent.",
    "Register it in the Brindlewick app so that guides, spare parts and notices reach you without searching.",
)
