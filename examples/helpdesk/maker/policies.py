"""Policies of the company: (title, text, ((question, answer word for word in the text), ...)), train and test apart."""
# ruff: noqa: E501  (template text: one entry per line reads better)

from __future__ import annotations

Policy = tuple[str, str, tuple[tuple[str, str], ...]]

POLICIES: dict[str, tuple[Policy, ...]] = {
    "train": (
        ("Returns of unused goods",
         "Anything bought from Brindlewick can be returned within 45 days of delivery, as long as it is unused. Print the label from the app, or ask for one at a store counter. "
         "The return itself is free for parcels under 12 kg; heavier ones cost £6.50, which we take off the sum paid back. Goods opened and tried are accepted too, but we keep 15 percent of the price. "
         "Hygiene articles such as blankets must still have the silver seal. Once the depot in Millbrae has scanned the parcel, the money leaves us within three working days. Gift buyers get store credit unless the giver agrees otherwise.",
         (("Within how many days can unused goods be returned?", "45 days"), ("What does it cost to return a parcel that is too heavy for a free return?", "£6.50"),
          ("What share of the price is kept for goods that were opened and tried?", "15 percent"), ("Which seal must still be on a returned blanket?", "the silver seal"),
          ("How soon does the money leave once the depot has scanned a return?", "three working days"))),
        ("Delivery times and fees",
         "Standard delivery takes two to four working days and costs £3.95; from a basket of £40 it is free. Express orders placed before 1 pm leave the same day. For the islands add two days, and a surcharge of £7. "
         "Swiftvan brings parcels up to 20 kg, everything above goes with Greyhound Freight, who phone a day ahead. If nobody is in, the driver tries twice and then leaves the parcel at the nearest shop, where it waits for eight days. "
         "Anybody may follow the van on the map once it is fewer than ten stops away.",
         (("From which basket value is standard delivery free?", "£40"), ("Before what time must an express order be placed to leave the same day?", "1 pm"),
          ("What is the surcharge for deliveries to the islands?", "£7"), ("Who delivers parcels that weigh more than 20 kg?", "Greyhound Freight"),
          ("How long does a missed parcel wait at the nearest shop?", "eight days"))),
        ("Warranty classes",
         "Every appliance carries a letter on its type plate. Class A is covered for five years, class B for three and class C for eighteen months; refurbished pieces, class R, for one year. The period begins on the day of delivery, not of purchase. "
         "Motors are a case apart: they are covered for ten years in every class but R. Batteries count as worn once they hold less than 60 percent and are exchanged free in the first two years. "
         "The cover ends if the type plate is removed or if a part was fitted by anyone who is not a listed workshop. Keep the slip, because a photo of it is all we ask for.",
         (("For how long is an appliance of class A covered?", "five years"), ("On which day does the warranty period begin?", "the day of delivery"),
          ("For how long are motors covered?", "ten years"), ("Below what charge does a battery count as worn?", "60 percent"),
          ("Which class letter do refurbished pieces have?", "R"))),
        ("Accounts and sign-in",
         "An account is made with an email address and a password of at least eleven characters. After five failed tries it is locked for half an hour; a store clerk can lift the lock at once if shown a photo card. "
         "Codes for the second step are sent by text and stay good for four minutes. Those who change their phone need one of the eight rescue words that are shown once, on the day of joining. "
         "An account nobody has used for 26 months is put to sleep, and its data is erased ninety days later. Two people may share one account by switching on House Mode in the settings.",
         (("How many characters must a password have at the least?", "eleven characters"), ("After how many failed tries is an account locked?", "five failed tries"),
          ("How long do codes sent by text stay good?", "four minutes"), ("After how long without use is an account put to sleep?", "26 months"),
          ("What must be switched on to let two people share an account?", "House Mode"))),
        ("Filter Club",
         "Members of the Filter Club get a fresh filter for their air purifier before the old one is spent. The Small plan costs £4 a month, the Family plan £7. Boxes go out on the ninth of the month and fit through a letter slot. "
         "A box can be skipped until six days before it leaves, and the whole plan may rest for up to four months in a year. There is no minimum term; whoever ends the plan keeps the box already paid for. "
         "Each twelfth box contains a free net. Used filters come back in the same carton, and for ten of them a tree is planted near Wexcombe.",
         (("What does the Family plan of the Filter Club cost a month?", "£7"), ("On which day of the month do Filter Club boxes go out?", "the ninth"),
          ("Until when can a Filter Club box be skipped?", "six days before it leaves"), ("For how long in a year may a Filter Club plan rest?", "up to four months"),
          ("What does each twelfth Filter Club box contain?", "a free net"))),
        ("Brindle Plus",
         "Brindle Plus is our membership for households that order often. It costs £29 a year and is paid in one sum. Members have express delivery without a fee, a second year of cover on small appliances, and the blue phone line, which answers in about 90 seconds. "
         "The first 21 days are a trial and cost nothing. A membership renews unless it is stopped by the evening before. It can be handed to a relative once, with the form called Pass It On. "
         "Shops and offices cannot join; for them there is the Trade Desk, which has terms of its own.",
         (("What is the yearly price of Brindle Plus?", "£29"), ("How long is the trial of Brindle Plus?", "21 days"),
          ("How fast does the blue phone line answer?", "about 90 seconds"), ("Which form is used to hand Brindle Plus to a relative?", "Pass It On"),
          ("To whom should shops and offices turn, as they cannot join Brindle Plus?", "the Trade Desk"))),
        ("Voucher and code rules",
         "One code can be used per order, and it must be entered before payment; we cannot add it afterwards. Codes for new customers are worth 10 percent and are good for sixty days. They do not apply to refurbished goods, gift cards and spare parts. "
         "A friend who is recommended brings the sender £8, credited when the friend's return window has closed. Birthday codes arrive three days early and can be used twice. "
         "Students prove their status on the page called Campus every September. When part of an order is returned, the reduction is shared out over the goods that stay.",
         (("How many codes can be used per order?", "One code"), ("For how long are new customers' codes good?", "sixty days"),
          ("What does the sender get for recommending a friend?", "£8"), ("How many times may a birthday code be used?", "twice"),
          ("On which page do students prove their status?", "Campus"))),
        ("Damage in transit",
         "Please look at a parcel while the driver is still there. Visible damage is noted with the word Crushed on the hand scanner. Hidden damage should be told to us within seven days, with three photos: the label, the carton and the thing itself. "
         "Keep the packing until a claim is settled. Goods below £25 need not be sent back. For all others a collector comes within two working days and brings the replacement along. "
         "If it is the last of its kind, you choose between repair and 30 percent off. Glass shades have their own carton, known as the egg box.",
         (("Which word is noted on the scanner for visible damage?", "Crushed"), ("Within how many days should hidden damage be reported?", "seven days"),
          ("How many photos are needed for a hidden damage claim?", "three photos"), ("Below what value need damaged goods not be sent back?", "£25"),
          ("What is the carton for glass shades known as?", "the egg box"))),
        ("Repairs at the workshop",
         "The main workshop is at Corrie, by the old tram shed, and takes in appliances from Monday to Thursday. Looking for a fault costs £18, which is waived when the repair goes ahead. Most repairs are done within nine days. "
         "While you wait, a loan appliance can be had for a deposit of £30. Every repaired part is covered for fourteen months. Appliances that nobody fetches are stored for half a year and then given to the Second Plug charity. "
         "Hot-water machines must be emptied and dry. Write the fault on the yellow ticket, in your own words.",
         (("What does looking for a fault at the workshop cost?", "£18"), ("Within how many days are most repairs done?", "nine days"),
          ("What is the deposit for a loan appliance?", "£30"), ("For how long is a repaired part covered?", "fourteen months"),
          ("Which charity gets appliances that nobody fetches?", "Second Plug"))),
        ("Bills and payment",
         "We take cards, bank transfer and Paynest, but no cheques. A card is charged when the parcel leaves, not before. By transfer you have ten days; the first reminder is free and the second costs £4.20. "
         "Orders above £150 may be split into four equal parts without interest. To have a bill in another name, write to accounts before the end of the quarter. A bill can be downloaded for seven years under Papers. "
         "If a sum was taken twice, the doubled one drops off by itself within five days, as it is only a hold.",
         (("When is a card charged?", "when the parcel leaves"), ("What does the second reminder cost?", "£4.20"),
          ("Above what value may an order be split into four parts?", "£150"), ("For how many years can a bill be downloaded?", "seven years"),
          ("Under which menu entry are bills found?", "Papers"))),
        ("Changing or cancelling an order",
         "An order stays open for 90 minutes. In that time it can be cancelled or altered with one tap on the pencil. Later it goes to the packers, and only its address can be changed, up to the moment the label turns green. "
         "A parcel on the road may be stopped for £2, which Swiftvan asks from us. Pre-orders are free to cancel until the Friday before release. Engraved pieces cannot be cancelled at all. "
         "When a code was used in a cancelled order it becomes good again after one night. Partial cancelling keeps free delivery in place.",
         (("How long does an order stay open?", "90 minutes"), ("Up to which moment can the address of an order be changed?", "the moment the label turns green"),
          ("What does stopping a parcel on the road cost?", "£2"), ("Which pieces cannot be cancelled at all?", "Engraved pieces"),
          ("Until when are pre-orders free to cancel?", "the Friday before release"))),
        ("Store opening and services",
         "Our store in Ashcombe is open from ten to seven, the one in Kestrel Bay from nine to half past five. All of them close on the first Tuesday of November for stock-taking. "
         "Each has a Tinker Table, where staff help with the first start of any appliance; a seat is booked for 25 minutes. Knives and grinder discs are sharpened for £5. Parcels bought online wait behind the counter for twelve days. "
         "Dogs are welcome, and there is a bowl of water at the door. Lost umbrellas are kept for one season.",
         (("When does the Kestrel Bay store open?", "nine"), ("On what day do all stores close for stock-taking?", "the first Tuesday of November"),
          ("For how long is a seat at the Tinker Table booked?", "25 minutes"), ("How much is the sharpening of grinder discs?", "£5"),
          ("For how long do online parcels wait behind the counter?", "twelve days"))),
        ("Gift cards",
         "Gift cards come in paper or by email, from £10 to £300. A paper card must be woken at the till before it works; one sent by email is alive at once. They are good for four years, and what remains stays on the card. "
         "A lost card is replaced against the till slip for a fee of £1.50. Up to three cards may be put together on one order. They cannot pay for memberships. "
         "Companies that buy fifty or more get six percent off and may print a logo on the sleeve. The sum on a card is shown when you scan the owl.",
         (("What is the highest value of a gift card?", "£300"), ("For how many years are gift cards good?", "four years"),
          ("What is the fee for replacing a lost gift card?", "£1.50"), ("How many gift cards may be put together on one order?", "three cards"),
          ("What do I scan to see the sum on a gift card?", "the owl"))),
        ("Wrong article in the parcel",
         "If the parcel holds something you did not order, leave it in its carton. In the app, open Orders and choose Not Mine; a courier fetches it within three days, between eight and two. The right article leaves Saltmarsh on the day of your message, if that comes before noon. "
         "You need not wait for the swap to be finished. Should you wish to keep what came, we offer it at 35 percent less. For a wrong colour alone you may instead take £9 of credit. "
         "An extra piece that nobody paid for can be given away: simply answer Gift to our email.",
         (("What is chosen under Orders if a parcel holds something not ordered?", "Not Mine"), ("From which place does the right article leave?", "Saltmarsh"),
          ("At what reduction may a wrong article be kept?", "35 percent"), ("How much credit may be taken for a wrong colour alone?", "£9"),
          ("What should be answered to the email about an extra piece that nobody paid for?", "Gift"))),
    ),
    "test": (
        ("Fresh Box terms",
         "The Fresh Box brings ingredients that suit your rice cooker or mixer. A box for two costs £19, for four £33. It is delivered on Saturdays in a cool bag, which we take back the next time. "
         "Changes are possible until Wednesday at six in the evening. Whoever is away can freeze deliveries for a maximum of seven weeks. To stop for good, open Kitchen in the app and press Clear Table. "
         "A recipe with nuts bears an acorn on the card. If anything arrives spoiled, one photo sent the same day gets you double its price as credit.",
         (("How much is a Fresh Box for four?", "£33"), ("Which weekday are Fresh Boxes delivered?", "Saturdays"), ("What is the maximum time that Fresh Box deliveries can be frozen?", "seven weeks"),
          ("What has to be pressed in order to stop the Fresh Box for good?", "Clear Table"), ("What symbol marks a Fresh Box recipe with nuts?", "an acorn"))),
        ("Recycling and take-back",
         "Any store takes back appliances of any make, up to a length of 55 cm, without a purchase. Larger ones are picked up from home for £11, by appointment, on alternate Thursdays. Batteries belong in the red tube near the exit. "
         "For a working Brindlewick appliance older than three years we pay a thank-you of £14 in credit. The metal goes to a smelter at Garrow, the plastic comes back as plant pots. "
         "Please wipe cameras and speakers first by holding Reset through two tones. In the year past, 61 tonnes were collected.",
         (("Up to what length do stores take back appliances?", "55 cm"), ("How much is the home pick-up of a larger old appliance?", "£11"), ("Where should old batteries be put in the store?", "the red tube"),
          ("How much credit is paid for an old but working Brindlewick appliance?", "£14"), ("What does the recycled plastic become?", "plant pots"))),
        ("Privacy of camera recordings",
         "Recordings of doorbell cameras are locked with a key that lives on your phone, and we cannot open them. Without a plan they are erased after two days, with the Vigil plan after forty. Police get nothing from us without a court letter, and you are told of it within 24 hours. "
         "The camera must not film the pavement: draw a grey mask over it under Sight. Visitors may ask you to erase a clip, and you then have nine days. "
         "Faces are never learned. Questions go to our privacy officer, Gwen Tallow, at her Stonehythe desk.",
         (("After how long are recordings erased under the Vigil plan?", "forty"), ("What do police need before they get anything?", "a court letter"), ("What must be drawn over the pavement in the camera picture?", "a grey mask"),
          ("How much time do I have if a visitor asks me to erase a clip?", "nine days"), ("Who is the privacy officer?", "Gwen Tallow"))),
        ("Moving house",
         "Tell us about a move in the app under Nest, at least four working days before it. Plans, warranties and the sharing of appliances then move along. Parcels that are on their way to the old door are sent on once, free of charge, within the same region; across a border that costs £5.60. "
         "For nine weeks we keep watch on the old address and warn you if something is sent there. Appliances tied to the old Wi-Fi accept the new one after a double press on Link. "
         "Movers get a box of felt pads, if they ask for it with the word Snail.",
         (("Where in the app does one report a move?", "Nest"), ("How much notice of a move is required?", "four working days"), ("What is charged for sending a parcel on across a border?", "£5.60"),
          ("For how long is the old address watched?", "nine weeks"), ("With what word does one ask for felt pads?", "Snail"))),
        ("Refurbished goods",
         "Refurbished goods have been opened, checked and cleaned at Eddlestow. They are graded by leaves: three leaves look new, two have light marks, one leaf has marks that can be seen from a distance. Each passes a test of 31 points. "
         "Their price lies between a quarter and a half below that of new goods. They may be returned within 20 days, and cover lasts a year. The carton is plain and bears a hedgehog. "
         "Accessories may be of another colour. On the last Sunday of a month, seconds are sold from the ramp, cash only.",
         (("What grade do refurbished goods with light marks get?", "two"), ("How many points has the test for refurbished goods?", "31 points"), ("What is the return period for refurbished goods?", "20 days"),
          ("Which animal is on the carton of refurbished goods?", "a hedgehog"), ("How must seconds at the ramp be paid for?", "cash only"))),
        ("Safety recall of heater plugs",
         "Fan heaters made between March and June of last year may have a plug that becomes hot. You know them by a batch mark that begins with Q8 under the base. Please stop using them. "
         "Cut off the cord, send us a picture, and you receive a whole new heater; nothing has to be posted. The hotline, 0800 555 014, answers from seven until ten at night. 4,300 pieces are concerned, of which two thirds are back. "
         "For your trouble we add a draught stopper. Other makes of plug, with a white ring, are safe.",
         (("With what does the batch mark of recalled heaters begin?", "Q8"), ("What has to be cut off a recalled heater?", "the cord"), ("What is the number of the recall hotline?", "0800 555 014"),
          ("How many heaters are concerned by the recall?", "4,300 pieces"), ("What is added for the trouble of the recall?", "a draught stopper"))),
        ("Complaints and the ombudsman",
         "A complaint is given a number that starts with an M, and one person who stays with it to the end. You hear from that person within one working day and have a decision in twelve. If you disagree, ask for a second look: it is made by somebody from another floor. "
         "After that the ombudsman for home goods in Lower Quill decides, at no cost to you, and we accept any ruling up to £900. "
         "Letters, calls and visits count alike. Staff may spend up to £35 on putting a thing right without asking anyone.",
         (("With what letter do complaint numbers start?", "M"), ("In how many working days is a complaint decided?", "twelve"), ("In which town does the ombudsman sit?", "Lower Quill"),
          ("Up to what sum are the ombudsman's rulings accepted?", "£900"), ("What may staff spend to put a thing right without asking?", "£35"))),
        ("Trade Desk",
         "Hotels, offices and landlords buy through the Trade Desk. The smallest order is eight pieces, or £400. Prices fall by nine percent from the twentieth piece. Payment is due after 28 days. "
         "Each customer has a contact with a direct line; out of hours the desk is reached through Porter Chat. Delivery goes to the floor, not to the kerb, and packaging is taken away. "
         "A broken piece is exchanged before noon of the following day in towns and by the evening elsewhere. Spare keys for locked thermostats are only given out with a stamped letter.",
         (("What is the smallest number of pieces in a trade order?", "eight pieces"), ("From which piece do trade prices fall?", "the twentieth piece"), ("When is payment due at the Trade Desk?", "after 28 days"),
          ("How is the Trade Desk reached out of hours?", "Porter Chat"), ("With what are spare keys for thermostats given out?", "a stamped letter"))),
        ("Help for people with low vision or hearing",
         "Every guide can be had in large print, in braille or read aloud, free of charge; braille takes about two weeks. Call the lilac line and say Guide. Our appliances have raised dots on the main key, and in the app the theme Lantern makes letters twice as large. "
         "Signers can be reached by video on weekdays from ten to three. A home visit for the first start costs nothing above the age of 75. "
         "Bumps to stick on knobs come in bags of sixteen. Guide dogs may ride in our delivery vans if you come along to the store.",
         (("How much time does a guide in braille take?", "about two weeks"), ("What is the name of the app theme with larger letters?", "Lantern"), ("At what age does a home visit become free?", "75"),
          ("How many bumps come in a bag?", "sixteen"), ("On which phone line does one ask for a guide in large print?", "the lilac line"))),
    ),
}
